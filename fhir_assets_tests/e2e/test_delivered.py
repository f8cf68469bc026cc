"""``delivered/<type>`` sends loaded resources to another FHIR server, and no others."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
import requests

from fhir_assets.definitions import build_definitions
from fhir_assets.errors import ConfigurationError
from fhir_assets.orchestration.jobs import MISSING_REFERENCES
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import add, materialize, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.uploads import assert_same, read_back

DAY = datetime(2024, 1, 5, tzinfo=UTC)
KEY, NEXT = "2024-01-05", "2024-01-06"


def encounter(identity: str, of: str) -> bytes:
    return (
        b'{"resourceType":"Encounter","id":"%b","meta":{"versionId":"1","lastUpdated":"2024-01-05T12:00:00.000Z"},'
        b'"status":"finished","class":{"code":"AMB"},"subject":{"reference":"Patient/%b"}}'
    ) % (identity.encode(), of.encode())


@pytest.fixture
def source() -> Iterator[SandboxServer]:
    patients = [patient(f"p{n}", DAY + timedelta(hours=n), gender="male") for n in range(30)]
    with SandboxServer([*(encounter(f"e{n}", f"p{n}") for n in range(30)), *patients]) as server:
        yield server


@pytest.fixture
def target() -> Iterator[SandboxServer]:
    with SandboxServer(referential_integrity=True) as server:
        yield server


@pytest.fixture
def deployment(deploy: Deploy, source: SandboxServer, target: SandboxServer) -> Deployment:
    return deploy(
        fhir_base_url=source.url,
        fhir_delivery_url=target.url,
        fhir_resource_types="Patient,Encounter",
        fhir_last_updated_gte="2024-01-01",
        fhir_max_attempts=1,
        batch_size=7,
    )


def load(deployment: Deployment, refresh: Refresh = Refresh.MISSING) -> bool:
    first, last = DAY, DAY + timedelta(days=2)
    return all(outcome.success for outcome in deployment.ingest(first=first, last=last, refresh=refresh))


def read_resources(server: SandboxServer) -> dict[str, bytes]:
    return read_back(server.url, ["Patient", "Encounter"])


def find_dead_letters(deployment: Deployment) -> list[tuple[object, ...]]:
    return deployment.query("SELECT resource_id, status FROM ops.dead_letters WHERE stage = 'deliver' ORDER BY id")


def test_loaded_resources_are_delivered_once_and_later_loads_deliver_only_new_ones(
    deployment: Deployment, source: SandboxServer, target: SandboxServer
) -> None:
    assert load(deployment)
    assert_same(read_resources(source), read_resources(target))
    target.reset_stats()
    assert load(deployment)
    assert target.stats()["requests"] == {}
    add(source, patient("late", DAY + timedelta(hours=40)))
    assert load(deployment, Refresh.WINDOW)
    after = read_resources(target)
    assert_same(read_resources(source), after)
    assert all(b'"versionId":"1"' in body for body in after.values())


def test_without_a_delivery_url_there_are_no_delivery_assets(deploy: Deploy, source: SandboxServer) -> None:
    graph = build_definitions(deploy(fhir_base_url=source.url).settings).resolve_asset_graph()
    assert {key.path[-1] for key in graph.get_all_asset_keys() if key.path[0] == "delivered"} == {"health_patient"}


def test_a_delivery_url_equal_to_the_source_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="FHIR_DELIVERY_URL"):
        load_settings(fhir_base_url="http://a.example.org/fhir/", fhir_delivery_url="http://a.example.org/fhir")


def test_resources_missing_from_the_tables_are_not_delivered(deployment: Deployment, target: SandboxServer) -> None:
    """A withheld or deleted resource is in the store, but not in the tables."""
    assert materialize(deployment, "raw/patient", "validated/patient", "normalized/patient", windows=[KEY]).success
    assert materialize(deployment, windows=[KEY]).success
    with connect(deployment.url) as conn:
        assert conn.execute("DELETE FROM fhir.resource WHERE id = 'p3'").rowcount == 1
        assert (
            conn.execute("UPDATE fhir.resource SET as_of = now(), last_updated = now() WHERE id = 'p4'").rowcount == 1
        )
    result = materialize(deployment, "delivered/patient", windows=[KEY])
    assert result.success
    assert read_resources(target).keys() == {f"Patient/p{n}" for n in range(24) if n not in (3, 4)}
    [event] = result.asset_materializations_for_node("delivered")
    assert (event.metadata["not_in_tables"].value, event.metadata["superseded"].value) == (1, 1)


def test_a_refused_resource_is_a_dead_letter_and_the_check_fails_until_it_is_delivered(
    deployment: Deployment, source: SandboxServer, target: SandboxServer
) -> None:
    add(source, encounter("lost", "nobody"))
    [run] = deployment.ingest(first=DAY, last=DAY + timedelta(days=1))
    assert run.success
    assert deployment.unreconciled(run) == []
    assert find_dead_letters(deployment) == [("lost", "open")]
    assert "Encounter/lost" not in read_resources(target)

    def accepted(run_id: str) -> dict[str, bool]:
        return {e.asset_key.path[-1]: e.passed for e in deployment.checks(run_id, "accepted")}

    assert accepted(run.run_id) == {"patient": True, "encounter": False}
    requests.put(
        f"{target.url}/Patient/nobody", json={"resourceType": "Patient", "id": "nobody"}, timeout=10
    ).raise_for_status()
    [again] = deployment.ingest(first=DAY, last=DAY + timedelta(days=1), refresh=Refresh.WINDOW)
    assert accepted(again.run_id) == {"patient": True, "encounter": True}
    assert find_dead_letters(deployment) == [("lost", "resolved")]
    assert "Encounter/lost" in read_resources(target)


def test_an_unreachable_target_fails_the_run_after_the_tables_are_loaded(deploy: Deploy, source: SandboxServer) -> None:
    settings = {
        "fhir_base_url": source.url,
        "fhir_resource_types": "Patient",
        "fhir_last_updated_gte": "2024-01-01",
        "fhir_max_attempts": 1,
    }
    deployment = deploy(fhir_delivery_url="http://127.0.0.1:9/fhir", **settings)
    assert not load(deployment)
    assert deployment.count_loaded() == {"Patient": 30}
    [(error,)] = deployment.query("SELECT DISTINCT error FROM ops.ingestion_runs WHERE status = 'FAILED'")
    assert "127.0.0.1:9" in str(error)
    assert "is FHIR_DELIVERY_URL right" in str(error)
    with SandboxServer() as target:
        repaired = deploy(
            home="again", fhir_delivery_url=target.url, fhir_store_url=deployment.settings.store_url, **settings
        )
        assert materialize(repaired, "delivered/patient", windows=[KEY, NEXT], refresh=Refresh.MISSING).success
        assert read_resources(target).keys() == {f"Patient/p{n}" for n in range(30)}


def test_a_delivery_asset_depends_on_the_validated_and_normalized_assets(deployment: Deployment) -> None:
    graph = build_definitions(deployment.settings).resolve_asset_graph()
    parents = graph.get(dg.AssetKey(["delivered", "patient"])).parent_keys
    layers = {dg.AssetKey(["validated", "patient"]), dg.AssetKey(["normalized", "patient"])}
    assert parents == {*layers, MISSING_REFERENCES}, "missing references that a backfill loads are delivered by its run"
