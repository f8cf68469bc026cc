"""Resources that no search by ``_lastUpdated`` finds are loaded, or the check of the open window is red."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.storage.manifest import Undated
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply
from fhir_assets_tests.support.search_server import Resource, SearchServer, outcome, resource


@pytest.fixture
def server() -> Iterator[SearchServer]:
    dated = [resource("Patient", f"p{n}") for n in range(3)]
    undated = [resource("Patient", f"u{n}", None) for n in range(2)]
    with SearchServer([*dated, *undated], dates_undated=False) as server:
        yield server


@pytest.fixture
def deployment(deploy: Deploy, server: SearchServer) -> Deployment:
    return deploy(
        fhir_base_url=server.url,
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-01",
        fhir_partition="monthly",
        fhir_max_attempts=1,
        fhir_page_size=2,
    )


def ids(deployment: Deployment) -> list[str]:
    return [identity for (identity,) in deployment.query("SELECT id FROM fhir.patient ORDER BY id")]


def last_search(deployment: Deployment) -> Undated | None:
    (key,) = deployment.store.partition_keys("raw", "Patient")[-1:]
    manifest = deployment.store.manifest("raw", "Patient", key)
    assert manifest
    assert manifest.fetched
    return next((fetch.undated for fetch in reversed(manifest.fetched.fetches) if fetch.undated), None)


def drop_totals(bundle: Resource, request: ReceivedRequest) -> None:
    bundle.pop("total")


def refuse_counts(request: ReceivedRequest, path: str) -> Reply | None:
    return outcome(400) if request.all("_summary") else None


def refuse_missing(request: ReceivedRequest, path: str) -> Reply | None:
    return outcome(400) if request.all("_lastUpdated:missing") else None


def find_none_by_missing(bundle: Resource, request: ReceivedRequest) -> None:
    if request.all("_lastUpdated:missing"):
        bundle |= {"total": 0, "entry": [], "link": []}


@pytest.mark.parametrize("bend", [None, drop_totals, find_none_by_missing])
@pytest.mark.parametrize("answer", [None, refuse_counts, refuse_missing])
def test_undated_resources_are_loaded(
    deployment: Deployment,
    server: SearchServer,
    bend: Callable[[Resource, ReceivedRequest], None] | None,
    answer: Callable[[ReceivedRequest, str], Reply | None] | None,
) -> None:
    server.bend, server.answer = bend, answer
    outcomes = deployment.ingest()
    assert all(run.success for run in outcomes)
    assert ids(deployment) == ["p0", "p1", "p2", "u0", "u1"]
    assert deployment.unreconciled(outcomes[-1]) == []


def test_a_resource_that_the_server_counts_and_no_search_returns_is_red(
    deployment: Deployment, server: SearchServer
) -> None:
    def hide(bundle: Resource, request: ReceivedRequest) -> None:
        bundle["entry"] = [entry for entry in bundle.get("entry", []) if entry["resource"]["id"] != "u1"]

    server.bend = hide
    outcomes = deployment.ingest()
    assert ids(deployment) == ["p0", "p1", "p2", "u0"]
    assert "the server counts 1 resources that neither its searches" in deployment.unreconciled(outcomes[-1])[0]
    server.bend = None
    later = deployment.ingest(refresh=Refresh.FULL)
    assert ids(deployment) == ["p0", "p1", "p2", "u0", "u1"]
    assert deployment.unreconciled(later[-1]) == []


def test_the_server_is_asked_again_after_a_day_and_an_undated_resource_that_changed_is_loaded(
    deployment: Deployment, server: SearchServer
) -> None:
    deployment.ingest()
    first = last_search(deployment)
    assert first
    assert (first.expected, first.found, first.repeated, first.missing) == (2, 2, 0, 0)
    server.resources[-1] = resource("Patient", "u1", None, gender="other")
    deployment.ingest()
    assert last_search(deployment) == first
    make_older(deployment, timedelta(days=1))
    outcomes = deployment.ingest()
    again = last_search(deployment)
    assert again
    assert (again.found, again.repeated) == (2, 1)
    assert deployment.query("SELECT gender FROM fhir.patient WHERE id = 'u1'") == [("other",)]
    assert deployment.unreconciled(outcomes[-1]) == []


def make_older(deployment: Deployment, age: timedelta) -> None:
    """Date the last search for undated resources back."""
    (key,) = deployment.store.partition_keys("raw", "Patient")[-1:]
    manifest = deployment.store.manifest("raw", "Patient", key)
    assert manifest
    assert manifest.fetched
    fetches = tuple(
        msgspec.structs.replace(
            fetch, undated=msgspec.structs.replace(fetch.undated, at=datetime.now(UTC) - age) if fetch.undated else None
        )
        for fetch in manifest.fetched.fetches
    )
    fetched = msgspec.structs.replace(manifest.fetched, fetches=fetches)
    deployment.store.commit([msgspec.structs.replace(manifest, fetched=fetched)])


def test_a_malformed_undated_resource_is_a_dead_letter(deployment: Deployment, server: SearchServer) -> None:
    server.resources.append({"resourceType": "Patient", "id": "", "gender": "male"})
    outcomes = deployment.ingest()
    assert deployment.count_dead_letters() == {"structure": 1}
    assert deployment.unreconciled(outcomes[-1]) == []


def test_a_server_whose_filters_match_undated_resources_is_not_read_twice(
    deployment: Deployment, server: SearchServer
) -> None:
    server.dates_undated = True
    deployment.ingest()
    found = last_search(deployment)
    assert found
    assert (found.expected, found.found) == (0, 0)
    unfiltered = [r for r in server.searches("Patient") if not r.all("_lastUpdated") and r.all("_summary") != ["count"]]
    assert not [r for r in unfiltered if not r.all("_sort")]
