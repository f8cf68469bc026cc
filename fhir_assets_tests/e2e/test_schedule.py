"""The windows that the schedule requests, and how it treats runs whose process has ended."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest

from fhir_assets.definitions import build_definitions
from fhir_assets.orchestration import dead_runs
from fhir_assets.orchestration.tags import FHIR_SERVER_POOL, RANGE_END, RANGE_START, TRIGGER_TAG
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.ops import checkpoints, liveness, runs
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.dagster_internals import ScheduleExecutionData
from fhir_assets_tests.support.deployment import Deploy, Deployment

NOW = datetime(2024, 3, 5, 12, tzinfo=UTC)


@pytest.fixture
def deployment(deploy: Deploy) -> Iterator[Deployment]:
    with SandboxServer([patient("a", NOW - timedelta(days=2))]) as server:
        yield deploy(fhir_base_url=server.url, fhir_resource_types="Patient", fhir_last_updated_gte="2024-01-01")


def tick(deployment: Deployment, now: datetime = NOW) -> ScheduleExecutionData:
    """One evaluation of the schedule at ``now``."""
    repository = build_definitions(deployment.settings).get_repository_def()
    with dg.build_schedule_context(deployment.instance, now, repository_def=repository) as context:
        return repository.get_schedule_def("incremental_load").evaluate_tick(context)


def set_checkpoint(deployment: Deployment, moment: datetime) -> None:
    with connect(deployment.url) as conn:
        checkpoints.begin(conn, ["Patient"], moment, source_state=None)


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without its lock counts as dead at once."""
    monkeypatch.setattr(dead_runs, "GRACE", timedelta(0))


def create_started_run(
    deployment: Deployment,
    run_status: dg.DagsterRunStatus = dg.DagsterRunStatus.STARTED,
    tags: dict[str, str] | None = None,
) -> str:
    """Create a run that Dagster lists as started, without a process. Return its id."""
    job = build_definitions(deployment.settings).resolve_job_def("incremental_load")
    run = deployment.instance.create_run_for_job(job, status=run_status, tags=tags)
    with connect(deployment.url) as conn:
        runs.start(conn, run.run_id, ["Patient"], ["2024-03-03"], triggered_by="test", at=NOW)
    return run.run_id


def read_statuses(deployment: Deployment, run_id: str) -> tuple[dg.DagsterRunStatus, str]:
    run = deployment.instance.get_run_by_id(run_id)
    assert run
    ((step_status,),) = deployment.query("SELECT status FROM ops.ingestion_runs WHERE run_id = %s", run_id)
    return run.status, step_status


def test_the_first_tick_requests_all_windows_from_the_oldest_resource_in_one_run(deployment: Deployment) -> None:
    (request,) = tick(deployment).run_requests or []
    assert (request.tags[RANGE_START], request.tags[RANGE_END]) == ("2024-03-03", "2024-03-05")


def test_after_a_downtime_a_tick_requests_the_windows_from_the_checkpoint_to_now(deployment: Deployment) -> None:
    set_checkpoint(deployment, NOW - timedelta(days=30))
    (request,) = tick(deployment).run_requests or []
    assert (request.tags[RANGE_START], request.tags[RANGE_END]) == ("2024-02-04", "2024-03-05")


def test_each_tick_requests_the_open_window_by_its_key_with_a_new_run_key(deployment: Deployment) -> None:
    set_checkpoint(deployment, NOW - timedelta(minutes=15))
    ticks = [tick(deployment, NOW + timedelta(minutes=late)) for late in (0, 15)]
    requests = [request for result in ticks for request in result.run_requests or []]
    assert [request.partition_key for request in requests] == ["2024-03-05"] * 2
    assert len({request.run_key for request in requests}) == 2


@pytest.mark.usefixtures("no_grace")
def test_nothing_is_requested_while_a_run_lives(deployment: Deployment) -> None:
    run_id = create_started_run(deployment)
    with connect(deployment.url, autocommit=True) as process:
        liveness.hold_liveness_lock(process, run_id)
        result = tick(deployment)
    assert not result.run_requests
    assert "not finished" in (result.skip_message or "")
    assert read_statuses(deployment, run_id) == (dg.DagsterRunStatus.STARTED, "RUNNING")


@pytest.mark.usefixtures("no_grace")
def test_a_dead_run_is_marked_as_failed_and_does_not_stop_the_schedule(deployment: Deployment) -> None:
    run_id = create_started_run(deployment)
    assert tick(deployment).run_requests
    assert read_statuses(deployment, run_id) == (dg.DagsterRunStatus.FAILURE, "FAILED")


@pytest.mark.parametrize("run_status", [dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTED])
def test_a_killed_ingest_is_marked_as_failed_at_once_and_frees_its_slot_in_the_pool(
    deployment: Deployment, run_status: dg.DagsterRunStatus
) -> None:
    run_id = create_started_run(deployment, run_status, {TRIGGER_TAG: "cli"})
    storage = deployment.instance.event_log_storage
    storage.set_concurrency_slots(FHIR_SERVER_POOL, 1)
    assert storage.claim_concurrency_slot(FHIR_SERVER_POOL, run_id, "raw__patient").is_claimed
    (outcome,) = deployment.ingest(first=NOW, last=NOW)
    assert outcome.success
    assert read_statuses(deployment, run_id) == (dg.DagsterRunStatus.FAILURE, "FAILED")


def test_a_run_that_has_just_started_is_not_marked_as_failed(deployment: Deployment) -> None:
    run_id = create_started_run(deployment)
    assert not tick(deployment).run_requests
    assert read_statuses(deployment, run_id)[0] is dg.DagsterRunStatus.STARTED


def test_a_run_holds_its_lock_until_it_ends(deployment: Deployment) -> None:
    seen = []

    def listen(event: dg.EventLogEntry) -> None:
        if event.dagster_event_type is dg.DagsterEventType.STEP_SUCCESS:
            with connect(deployment.url) as conn:
                seen.append(liveness.find_alive(conn, [event.run_id]) == {event.run_id})

    ingestion = deployment.ingestion()
    (windows,) = ingestion.due_loads.find(first=NOW, last=NOW)
    outcome = ingestion.load(windows, refresh=Refresh.MISSING, triggered_by="test", listener=listen)
    assert seen == [True] * 3
    with connect(deployment.url) as conn:
        assert liveness.find_alive(conn, [outcome.run_id]) == frozenset()
