"""Ticks of the schedule at which the source has nothing new, or something new for some of the resource types."""

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec
import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.definitions import build_definitions
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.ops import checkpoints
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import add, encounter, instant, patient
from fhir_assets_tests.support.dagster_internals import ScheduleExecutionData
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.imported_modules import list_imported_modules
from fhir_assets_tests.support.scripted_server import Reply
from fhir_assets_tests.support.search_server import SearchServer, outcome, resource

pytestmark = pytest.mark.slow

MAX_EVENTS = 150
"""The largest number of events that a tick without news may write."""


def today() -> datetime:
    """Return a moment of the window of the present that is in the past."""
    return datetime.now(UTC) - timedelta(seconds=2)


def start_of_data() -> str:
    return f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}"


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    with SandboxServer([]) as server:
        add(server, patient("p1", today(), gender="male"), patient("bad", today(), gender="Wintergarten"))
        add(server, encounter("e1", today(), "Patient/p1"), encounter("e2", today(), "Patient/none"))
        yield server


def deploy_two_types(deploy: Deploy, server: SandboxServer | SearchServer, **settings: object) -> Deployment:
    values = {
        "fhir_resource_types": "Patient,Encounter",
        "fhir_last_updated_gte": start_of_data(),
        "fhir_overlap_seconds": 120,
        **settings,
    }
    deployment = deploy(fhir_base_url=server.url, **values)
    assert all(outcome.success for outcome in deployment.ingest())
    return deployment


@pytest.fixture
def deployment(deploy: Deploy, server: SandboxServer) -> Deployment:
    return deploy_two_types(deploy, server)


def tick(deployment: Deployment) -> ScheduleExecutionData:
    """Evaluate the schedule now."""
    repository = build_definitions(deployment.settings).get_repository_def()
    with dg.build_schedule_context(deployment.instance, datetime.now(UTC), repository_def=repository) as context:
        return repository.get_schedule_def("incremental_load").evaluate_tick(context)


def request(deployment: Deployment) -> dg.RunRequest:
    """Return the only request of a tick."""
    (run_request,) = tick(deployment).run_requests or ()
    return run_request


def requested_types(deployment: Deployment) -> set[str]:
    """Return the types that the request of a tick loads, as they are called in asset keys."""
    assets = request(deployment).asset_selection
    return {"patient", "encounter"} if assets is None else {k.path[-1] for k in assets if k.path[0] == "raw"}


def execute(deployment: Deployment, run_request: dg.RunRequest) -> dg.ExecuteInProcessResult:
    """Execute the run of a request, as the daemon does."""
    job = build_definitions(deployment.settings).resolve_job_def("incremental_load")
    if run_request.asset_selection is not None:
        job = job.get_subset(
            asset_selection=set(run_request.asset_selection),
            asset_check_selection=set(run_request.asset_check_keys or ()),
        )
    return job.execute_in_process(
        instance=deployment.instance, partition_key=run_request.partition_key, tags=dict(run_request.tags)
    )


def count_events(deployment: Deployment) -> int:
    ((count,),) = deployment.query("SELECT count(*) FROM event_logs")
    return int(count)


def read_check_state(deployment: Deployment) -> list[tuple[Any, ...]]:
    """Return what the UI reads of checks: their executions, and the last materialization of each asset."""
    return [
        *deployment.query(
            "SELECT asset_key, check_name, partition, execution_status, evaluation_event_storage_id,"
            " materialization_event_storage_id FROM asset_check_executions ORDER BY id"
        ),
        *deployment.query("SELECT asset_key, last_materialization_timestamp, last_run_id FROM asset_keys ORDER BY 1"),
    ]


def read_checkpoints(deployment: Deployment) -> dict[str, datetime]:
    with connect(deployment.url) as conn:
        found = checkpoints.get(conn, deployment.settings.fhir_resource_types)
    return {name: checkpoint.loaded_until for name, checkpoint in found.items()}


@pytest.mark.slow
def test_a_tick_of_all_default_types_without_news_writes_hardly_any_events_and_leaves_every_result(
    deploy: Deploy, server: SandboxServer
) -> None:
    deployment = deploy(fhir_base_url=server.url, fhir_last_updated_gte=start_of_data())
    assert all(outcome.success for outcome in deployment.ingest())
    types = deployment.settings.fhir_resource_types
    assert len(types) >= 30
    events, state, until = count_events(deployment), read_check_state(deployment), read_checkpoints(deployment)
    result = tick(deployment)
    assert not result.run_requests
    assert "nothing new" in (result.skip_message or "")
    assert count_events(deployment) - events < MAX_EVENTS
    assert read_check_state(deployment) == state
    assert {name for name, moment in read_checkpoints(deployment).items() if moment > until[name]} == set(types)


def test_a_tick_requests_a_run_for_the_types_with_something_new_only(
    deployment: Deployment, server: SandboxServer
) -> None:
    events, state = count_events(deployment), read_check_state(deployment)
    assert not tick(deployment).run_requests
    assert (count_events(deployment), read_check_state(deployment)) == (events, state)
    add(server, encounter("e3", today(), "Patient/p1"))
    run_request = request(deployment)
    assert run_request.asset_selection is not None
    assert {key.path[0] for key in run_request.asset_selection} == {"raw", "validated", "normalized"}
    assert requested_types(deployment) == {"encounter"}
    result = execute(deployment, run_request)
    assert result.success
    assert deployment.count_loaded() == {"Patient": 1, "Encounter": 3}
    assert not deployment.query("SELECT FROM asset_check_executions WHERE execution_status = 'PLANNED'")
    assert not tick(deployment).run_requests


def test_what_is_committed_late_is_loaded_after_ticks_without_news(deploy: Deploy, server: SandboxServer) -> None:
    deployment = deploy_two_types(deploy, server, fhir_overlap_seconds=600)
    for _ in range(3):
        assert not tick(deployment).run_requests
    add(server, patient("late", datetime.now(UTC) - timedelta(seconds=60)))
    assert execute(deployment, request(deployment)).success
    assert deployment.count_loaded() == {"Patient": 2, "Encounter": 2}
    assert not tick(deployment).run_requests


def test_a_new_version_of_a_resource_within_the_overlap_is_loaded(deploy: Deploy, server: SandboxServer) -> None:
    deployment = deploy_two_types(deploy, server, fhir_overlap_seconds=600)
    add(server, patient("p1", today(), version="2", gender="female"))
    assert execute(deployment, request(deployment)).success
    assert deployment.query("SELECT gender FROM fhir.patient") == [("female",)]


def test_a_window_that_has_ended_is_materialized_once_even_if_it_is_empty(deployment: Deployment) -> None:
    yesterday = deployment.settings.window_scheme.window_at(datetime.now(UTC) - timedelta(days=1))
    deployment.ingest(first=yesterday.start, last=yesterday.start)
    for name in deployment.settings.fhir_resource_types:
        (manifest,) = deployment.store.manifests("raw", name, [yesterday.key])
        assert manifest.fetched
        (fetch,) = manifest.fetched.fetches
        earlier = yesterday.end - timedelta(minutes=10)
        fetched = msgspec.structs.replace(
            manifest.fetched,
            complete=False,
            until=earlier,
            fetches=(msgspec.structs.replace(fetch, end=earlier),),
        )
        deployment.store.commit([msgspec.structs.replace(manifest, fetched=fetched)])
    with connect(deployment.url) as conn:
        checkpoints.begin(conn, deployment.settings.fhir_resource_types, earlier, source_state=None)
    run_request = request(deployment)
    assert run_request.asset_selection is None
    assert execute(deployment, run_request).success
    assert not tick(deployment).run_requests
    (manifest,) = deployment.store.manifests("raw", "Patient", [yesterday.key])
    assert manifest.fetched
    assert manifest.fetched.complete


def remove_loaded_parts(deployment: Deployment) -> None:
    deployment.query("DELETE FROM ops.loaded_parts WHERE resource_type = 'Patient' RETURNING part")


def fail_last_run(deployment: Deployment) -> None:
    deployment.query("UPDATE ops.ingestion_runs SET status = 'FAILED' WHERE resource_type = 'Patient' RETURNING 1")


def change_rules(deployment: Deployment) -> None:
    for manifest in deployment.store.manifests("validated", "Patient", [f"{datetime.now(UTC):%Y-%m-%d}"]):
        assert manifest.validated
        state = msgspec.structs.replace(manifest.validated, rules_version="earlier")
        deployment.store.commit([msgspec.structs.replace(manifest, validated=state)])


def receive(deployment: Deployment) -> None:
    deployment.query(
        "INSERT INTO ops.received (origin, channel, resource_type, partition_key, parts, rows, rejected)"
        " VALUES ('landing:1', 'landing', 'Patient', %s, '{a}', 1, 0) RETURNING 1",
        f"{datetime.now(UTC):%Y-%m-%d}",
    )


@pytest.mark.parametrize("change", [remove_loaded_parts, fail_last_run, change_rules, receive])
def test_a_type_of_which_a_layer_is_not_complete_is_loaded(
    deployment: Deployment, change: Callable[[Deployment], None]
) -> None:
    assert not tick(deployment).run_requests
    change(deployment)
    assert requested_types(deployment) == {"patient"}


def test_a_change_of_the_consent_policy_is_applied_by_a_run(deployment: Deployment, server: SandboxServer) -> None:
    deployment.settings = deployment.settings.model_copy(update={"consent_policy": "opt-out"})
    assert requested_types(deployment) == {"patient", "encounter"}


def test_a_deletion_at_the_source_is_applied_by_a_run(deploy: Deploy, server: SandboxServer) -> None:
    deployment = deploy_two_types(deploy, server, fhir_deletes="history")
    assert not tick(deployment).run_requests
    with FhirClient(server.url) as client:
        client.send("DELETE", "Patient/p1")
    run_request = request(deployment)
    assert {key.path[-1] for key in run_request.asset_selection or () if key.path[0] == "raw"} == {"patient"}
    assert execute(deployment, run_request).success
    assert not deployment.query("SELECT FROM fhir.patient WHERE id = 'p1'")
    assert not tick(deployment).run_requests


TYPES = ("Patient", "Encounter")


def refuse_patients(server: SearchServer) -> None:
    server.answer = lambda request, path: outcome(403, "forbidden") if path == "Patient" else None


def count_one_more(server: SearchServer) -> None:
    def bend(bundle: dict[str, Any], request: object) -> None:
        bundle["total"] += 1

    server.bend = bend


def return_no_resource(server: SearchServer) -> None:
    def bend(bundle: dict[str, Any], request: object) -> None:
        bundle["entry"] = [{"resource": {"resourceType": "Patient", "id": 7}}]

    server.bend = bend


def reset_connections(server: SearchServer) -> None:
    server.answer = lambda request, path: Reply(reset=True) if path == "Patient" else None


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (refuse_patients, {"patient"}),
        (count_one_more, {"patient", "encounter"}),
        (return_no_resource, {"patient", "encounter"}),
        # Without an answer the other types are not examined: a tick ends soon.
        (reset_connections, {"patient", "encounter"}),
    ],
)
def test_a_type_for_which_the_server_gives_no_clear_answer_is_loaded(
    deploy: Deploy, fault: Callable[[SearchServer], None], expected: set[str]
) -> None:
    with SearchServer([resource("Patient", "p1", instant(today()))], types=TYPES) as server:
        deployment = deploy_two_types(deploy, server, fhir_max_attempts=1)
        assert not tick(deployment).run_requests
        fault(server)
        assert requested_types(deployment) == expected


def test_parts_that_another_process_adds_during_a_tick_are_kept_and_loaded(deploy: Deploy) -> None:
    with SearchServer([resource("Patient", "p1", instant(today()))], types=TYPES) as server:
        deployment = deploy_two_types(deploy, server)
        until = read_checkpoints(deployment)
        store, key = deployment.store, f"{datetime.now(UTC):%Y-%m-%d}"

        def receive_during_the_search(request: object, path: str) -> None:
            (manifest,) = store.manifests("raw", "Patient", [key])
            if path == "Patient" and not any(part.origin for part in manifest.parts):
                part = msgspec.structs.replace(manifest.parts[0], name="received", origin="landing:1")
                store.commit([msgspec.structs.replace(manifest, parts=(*manifest.parts, part))])

        server.answer = receive_during_the_search
        assert requested_types(deployment) == {"patient"}
        (manifest,) = store.manifests("raw", "Patient", [key])
        assert [part.origin for part in manifest.parts] == [None, "landing:1"]
        assert read_checkpoints(deployment)["Patient"] == until["Patient"]
        assert read_checkpoints(deployment)["Encounter"] > until["Encounter"]


def test_a_type_with_something_to_deliver_is_loaded(deploy: Deploy) -> None:
    with SearchServer([resource("Patient", "p1", instant(today()))], types=TYPES) as server:
        deployment = deploy_two_types(deploy, server)
        deployment.settings = deployment.settings.model_copy(update={"fhir_delivery_url": server.url})
        assert requested_types(deployment) == {"patient"}
        deployment.query(
            "INSERT INTO ops.held_windows (destination, resource_type, partition_key, run_id)"
            " VALUES ('delivered ' || %s, 'Encounter', '2024-01-05', 'r') RETURNING 1",
            server.url,
        )
        assert requested_types(deployment) == {"patient", "encounter"}


def test_a_type_that_the_server_does_not_offer_causes_no_run(deploy: Deploy) -> None:
    with SearchServer([resource("Patient", "p1", instant(today()))], types=TYPES[:1]) as server:
        deployment = deploy_two_types(deploy, server)
        assert not tick(deployment).run_requests
        server.resources.append(resource("Patient", "p2", instant(today())))
        assert requested_types(deployment) == {"patient"}


def test_ingest_without_news_needs_no_run_unless_a_window_does_not_reconcile(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in deployment.environment().items():
        monkeypatch.setenv(name, value)
    events = count_events(deployment)
    result = CliRunner().invoke(app, ["ingest"])
    assert result.exit_code == 0
    assert "nothing to do" in result.output
    assert count_events(deployment) == events
    deployment.query("DELETE FROM fhir.resource WHERE resource_type = 'Patient' RETURNING 1")
    result = CliRunner().invoke(app, ["ingest"])
    assert result.exit_code == 1
    assert "does not reconcile" in result.output


def test_ingest_without_news_does_not_import_dagster(deployment: Deployment, tmp_path: Path) -> None:
    environment = {**os.environ, **deployment.environment()}
    assert list_imported_modules(environment, tmp_path, "ingest") & {"dagster", "sqlalchemy"} == set()
