"""A type that the server refuses fails alone: the others are loaded, and the failure names the type and the cause."""

from collections.abc import Iterator
from typing import Any

import pytest

from fhir_assets.errors import NotFhir, ServerRefused
from fhir_assets.ingestion.outcome import Outcome
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.type_failures import TypeFailures
from fhir_assets.warehouse.ops import checkpoints, runs
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, reply
from fhir_assets_tests.support.search_server import SearchServer, outcome, resource

pytestmark = pytest.mark.slow

TYPES = ("Patient", "Observation", "Encounter")
NEEDS_PATIENT = outcome(400, "required", "needs patient")

REFUSALS = {
    "403": Reply(b"{}", 403),
    "401": Reply(b"{}", 401),
    "404": outcome(404, "not-found"),
    "400, because it needs a patient": NEEDS_PATIENT,
    "500": outcome(500, "exception"),
    "a page that is no Bundle": reply({"resourceType": "Patient"}),
    "HTML": Reply(b"<html>login</html>"),
}


@pytest.fixture
def server() -> Iterator[SearchServer]:
    visit: dict[str, Any] = {"status": "finished", "class": {"code": "AMB"}, "subject": {"reference": "Patient/p2"}}
    with SearchServer([resource("Patient", "p1"), resource("Encounter", "e1", **visit)], types=TYPES) as server:
        yield server


@pytest.fixture
def deployment(deploy: Deploy, server: SearchServer) -> Deployment:
    return deploy(
        fhir_base_url=server.url,
        fhir_resource_types=",".join(TYPES),
        fhir_last_updated_gte="2024-01-01",
        fhir_partition="monthly",
        fhir_max_attempts=1,
    )


def refuse(server: SearchServer, refusal: Reply | None, resource_type: str = "Observation", path: str = "") -> None:
    def answer(request: ReceivedRequest, asked: str) -> Reply | None:
        return refusal if asked == f"{resource_type}{path}" else None

    server.answer = answer if refusal else None


def failed_types(deployment: Deployment, outcomes: list[Outcome]) -> dict[str, list[str]]:
    with connect(deployment.url) as conn:
        return {error: types for item in outcomes for error, types in runs.get_errors(conn, item.run_id).items()}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_the_other_types_are_loaded_and_the_failure_names_the_type_and_the_cause(
    deployment: Deployment, server: SearchServer, refusal: Reply
) -> None:
    refuse(server, refusal)
    outcomes = deployment.ingest()
    assert outcomes
    assert not any(item.success for item in outcomes)
    assert deployment.count_loaded() == {"Patient": 1, "Encounter": 1}
    errors = failed_types(deployment, outcomes)
    assert list(errors.values()) == [["Observation"]]
    assert "/Observation" in next(iter(errors))


def test_the_checkpoint_of_the_refused_type_stays_and_the_next_load_fetches_all_of_it(
    deployment: Deployment, server: SearchServer
) -> None:
    coded = {"status": "final", "code": {"text": "c"}}
    server.resources.append(resource("Observation", "o1", "2024-02-05T10:00:00Z", **coded))
    refuse(server, REFUSALS["403"])
    deployment.ingest()
    with connect(deployment.url) as conn:
        known = checkpoints.get(conn, TYPES)
    assert set(known) == {"Patient", "Encounter"}
    (again,) = deployment.ingest()
    assert not again.success
    refuse(server, None)
    later = deployment.ingest()
    assert all(item.success for item in later)
    assert deployment.count_loaded() == {"Patient": 1, "Encounter": 1, "Observation": 1}


def test_a_type_refused_after_its_first_load_keeps_its_checkpoint(deployment: Deployment, server: SearchServer) -> None:
    deployment.ingest()
    with connect(deployment.url) as conn:
        before = checkpoints.get(conn, ["Observation"])["Observation"].loaded_until
    refuse(server, REFUSALS["403"])
    (outcome_of_run,) = deployment.ingest()
    assert not outcome_of_run.success
    with connect(deployment.url) as conn:
        after = checkpoints.get(conn, TYPES)
    assert after["Observation"].loaded_until == before
    assert after["Patient"].loaded_until > before


def test_a_full_refresh_loads_the_other_types(deployment: Deployment, server: SearchServer) -> None:
    deployment.ingest()
    refuse(server, REFUSALS["403"])
    server.resources.append(resource("Patient", "p3"))
    outcomes = deployment.ingest(refresh=Refresh.FULL)
    assert not any(item.success for item in outcomes)
    assert deployment.count_loaded()["Patient"] == 2


def test_a_full_refresh_ignores_types_that_the_server_does_not_offer(
    deployment: Deployment, server: SearchServer
) -> None:
    server.types = TYPES[:2]
    assert all(item.success for item in deployment.ingest(refresh=Refresh.FULL))


def test_a_server_that_refuses_every_type_is_an_error_before_any_run(
    deployment: Deployment, server: SearchServer
) -> None:
    server.answer = lambda request, path: None if path == "metadata" else Reply(b"{}", 403)
    with pytest.raises(ServerRefused, match=r"Patient: GET .*/Patient: the server answered 403.*Observation: "):
        deployment.ingest()


def test_missing_references_of_the_other_types_are_fetched(deployment: Deployment, server: SearchServer) -> None:
    refers: dict[str, Any] = {"status": "final", "code": {"text": "c"}, "encounter": {"reference": "Encounter/e2"}}
    server.resources.append(resource("Observation", "o1", **refers))
    deployment.ingest()
    server.resources.append(resource("Patient", "p2"))
    visit: dict[str, Any] = {"status": "finished", "class": {"code": "AMB"}}
    server.resources.append(resource("Encounter", "e2", **visit))
    refuse(server, REFUSALS["403"], "Patient")
    reason = deployment.ingestion().fetch_missing_references(triggered_by="test")
    assert reason
    assert reason.startswith(f"Patient: GET {server.url}/Patient: the server answered 403")
    load_received(deployment)
    assert deployment.count_loaded() == {"Patient": 1, "Encounter": 2, "Observation": 1}
    refuse(server, None)
    assert deployment.ingestion().fetch_missing_references(triggered_by="test") is None
    load_received(deployment)
    assert deployment.count_loaded() == {"Patient": 2, "Encounter": 2, "Observation": 1}


def load_received(deployment: Deployment) -> None:
    for received in deployment.ingestion().find_received():
        assert deployment.ingestion().load_received(received, triggered_by="test").success


def test_the_collected_failures_name_each_cause_once() -> None:
    failures = TypeFailures()
    collect(failures, "Patient", NotFhir("the server answered with HTML"))
    collect(failures, "Observation", NotFhir("the server answered with HTML"))
    collect(failures, "Encounter", ServerRefused("403"))
    with pytest.raises(NotFhir, match=r"^Patient, Observation: the server answered with HTML; Encounter: 403$"):
        failures.raise_collected()


def collect(failures: TypeFailures, resource_type: str, error: Exception) -> None:
    with failures.collect(resource_type):
        raise error
