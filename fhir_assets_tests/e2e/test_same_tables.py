"""The same 8,421 resources give identical tables through every channel. A new channel is a function in CHANNELS."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.deployment import SHARED, Deploy, Deployment
from fhir_assets_tests.support.faults import ALL_FAULTS
from fhir_assets_tests.support.landing import LandingZone, land

SYNTHEA = SHARED / "synthea"

Through = Callable[[Deploy, Path, pytest.FixtureRequest], Deployment]
"""Loads all of Synthea into a deployment with the given settings and asserts that every window reconciles."""


@contextmanager
def serve_synthea() -> Iterator[SandboxServer]:
    with SandboxServer(SYNTHEA) as server:
        yield server


def ingest_and_reconcile(deployment: Deployment) -> Deployment:
    outcomes = deployment.ingest()
    assert all(outcome.success for outcome in outcomes)
    assert [deployment.unreconciled(outcome) for outcome in outcomes] == [[]] * len(outcomes)
    return deployment


def through_files(deploy: Deploy, folder: Path, request: pytest.FixtureRequest) -> Deployment:
    return ingest_and_reconcile(
        deploy(home="files", fhir_source="ndjson", fhir_base_url=str(SYNTHEA), fhir_partition="monthly")
    )


def through_search(deploy: Deploy, folder: Path, request: pytest.FixtureRequest) -> Deployment:
    with serve_synthea() as server:
        return ingest_and_reconcile(deploy(home="search", fhir_base_url=server.url, fhir_partition="monthly"))


def through_search_with_faults(deploy: Deploy, folder: Path, request: pytest.FixtureRequest) -> Deployment:
    """Load by search while the server injects every transient fault at least once."""
    with SandboxServer(SYNTHEA, faults=ALL_FAULTS) as server:
        deployment = deploy(
            home="bad", fhir_base_url=server.url, fhir_partition="monthly", fhir_page_size=50, fhir_max_attempts=12
        )
        ingest_and_reconcile(deployment)
        injected = server.stats()["struck"]
    assert {kind for kind, times in injected.items() if times} == {fault.kind for fault in ALL_FAULTS}
    return deployment


def through_bulk(deploy: Deploy, folder: Path, request: pytest.FixtureRequest) -> Deployment:
    with serve_synthea() as server:
        deployment = ingest_and_reconcile(
            deploy(home="bulk", fhir_source="bulk", fhir_base_url=server.url, fhir_partition="monthly")
        )
        assert server.stats()["kick_offs"] == 1
    return deployment


def landed(deployment: Deployment, zone: LandingZone) -> Deployment:
    for path in sorted(SYNTHEA.glob("*.ndjson.gz")):
        zone.put(path.name, path.read_bytes())
    assert land(deployment) == []
    return deployment


def through_landing_folder(deploy: Deploy, folder: Path, request: pytest.FixtureRequest) -> Deployment:
    zone = LandingZone(str(folder / "landing"))
    return landed(deploy(home="landing", fhir_landing_url=zone.url, fhir_partition="monthly"), zone)


def through_landing_bucket(deploy: Deploy, folder: Path, request: pytest.FixtureRequest) -> Deployment:
    """Load from a bucket that also contains the store."""
    url = request.getfixturevalue("s3_url")
    zone = LandingZone(f"{url}/landing")
    deployment = deploy(
        home="bucket", fhir_landing_url=zone.url, fhir_store_url=f"{url}/store", fhir_partition="monthly"
    )
    return landed(deployment, zone)


def filled(deployment: Deployment) -> dict[str, list[str]]:
    return {name: rows for name, rows in deployment.tables().items() if rows}


CHANNELS: dict[str, Through] = {
    "search": through_search,
    "search with faults": through_search_with_faults,
    "bulk": through_bulk,
    "landing folder": through_landing_folder,
    "landing bucket": through_landing_bucket,
}
"""The channels whose tables are compared with the tables of the files."""


@pytest.mark.slow
@pytest.mark.skipif(not SYNTHEA.exists(), reason="the shared data is not beside this checkout")
@pytest.mark.parametrize("channel", CHANNELS)
def test_synthea_gives_the_same_tables_through_every_ingestion_channel(
    deploy: Deploy, empty_database: str, tmp_path: Path, request: pytest.FixtureRequest, channel: str
) -> None:
    expected = through_files(deploy, tmp_path, request)

    def elsewhere(**settings: object) -> Deployment:
        return deploy(url=empty_database, **settings)

    loaded = CHANNELS[channel](elsewhere, tmp_path, request)
    assert sum(loaded.count_loaded().values()) == 8421
    # Received resources create the tables of their types only; a load of files creates empty tables of other types.
    assert filled(loaded) == filled(expected)
    assert loaded.count_dead_letters() == expected.count_dead_letters() == {}
