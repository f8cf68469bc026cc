"""What the schedule asks for, and what it does about runs whose process is gone."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
from dagster._core.definitions.schedule_definition import ScheduleExecutionData

from fhir_assets.definitions import build_definitions
from fhir_assets.orchestration import dead_runs
from fhir_assets.orchestration.tags import FHIR_SERVER_POOL, RANGE_END, RANGE_START, TRIGGER_TAG
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.ops import checkpoints, runs
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.e2e.conftest import Deploy, Deployment
from fhir_assets_tests.support.content import patient

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


def loaded_until(deployment: Deployment, moment: datetime) -> None:
    with connect(deployment.url) as conn:
        checkpoints.begin(conn, ["Patient"], moment, source_state=None)


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run counts as dead at once."""
    monkeypatch.setattr(dead_runs, "GRACE", timedelta(0))


def started(
    deployment: Deployment,
    run_status: dg.DagsterRunStatus = dg.DagsterRunStatus.STARTED,
    tags: dict[str, str] | None = None,
) -> str:
    """A run that Dagster believes to be at work."""
    job = build_definitions(deployment.settings).resolve_job_def("incremental_load")
    run = deployment.instance.create_run_for_job(job, status=run_status, tags=tags)
    with connect(deployment.url) as conn:
        runs.start(conn, run.run_id, ["Patient"], ["2024-03-03"], triggered_by="test", at=NOW)
    return run.run_id


def status(deployment: Deployment, run_id: str) -> tuple[dg.DagsterRunStatus, str]:
    run = deployment.instance.get_run_by_id(run_id)
    assert run
    ((account,),) = deployment.query("SELECT status FROM ops.ingestion_runs WHERE run_id = %s", run_id)
    return run.status, account


def test_the_first_tick_asks_for_everything_from_the_oldest_resource_in_one_run(deployment: Deployment) -> None:
    (request,) = tick(deployment).run_requests or []
    assert (request.tags[RANGE_START], request.tags[RANGE_END]) == ("2024-03-03", "2024-03-05")


def test_after_downtime_a_tick_asks_from_the_checkpoint_to_now(deployment: Deployment) -> None:
    loaded_until(deployment, NOW - timedelta(days=30))
    (request,) = tick(deployment).run_requests or []
    assert (request.tags[RANGE_START], request.tags[RANGE_END]) == ("2024-02-04", "2024-03-05")


def test_the_open_window_is_asked_for_by_its_key_and_with_a_new_run_key_at_each_tick(deployment: Deployment) -> None:
    loaded_until(deployment, NOW - timedelta(minutes=15))
    ticks = [tick(deployment, NOW + timedelta(minutes=late)) for late in (0, 15)]
    requests = [request for each in ticks for request in each.run_requests or []]
    assert [request.partition_key for request in requests] == ["2024-03-05"] * 2
    assert len({request.run_key for request in requests}) == 2


@pytest.mark.usefixtures("no_grace")
def test_nothing_is_asked_for_while_a_living_run_is_at_work(deployment: Deployment) -> None:
    run_id = started(deployment)
    with connect(deployment.url, autocommit=True) as process:
        runs.hold(process, run_id)
        found = tick(deployment)
    assert not found.run_requests
    assert "not finished" in (found.skip_message or "")
    assert status(deployment, run_id) == (dg.DagsterRunStatus.STARTED, "RUNNING")


@pytest.mark.usefixtures("no_grace")
def test_a_run_whose_process_is_gone_is_given_up_and_does_not_stop_the_schedule(deployment: Deployment) -> None:
    run_id = started(deployment)
    assert tick(deployment).run_requests
    assert status(deployment, run_id) == (dg.DagsterRunStatus.FAILURE, "FAILED")


@pytest.mark.parametrize("run_status", [dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTED])
def test_a_killed_ingest_is_given_up_at_once_and_its_place_at_the_fhir_server_is_free_again(
    deployment: Deployment, run_status: dg.DagsterRunStatus
) -> None:
    run_id = started(deployment, run_status, {TRIGGER_TAG: "cli"})
    storage = deployment.instance.event_log_storage
    storage.set_concurrency_slots(FHIR_SERVER_POOL, 1)
    assert storage.claim_concurrency_slot(FHIR_SERVER_POOL, run_id, "raw__patient").is_claimed
    (outcome,) = deployment.ingest(first=NOW, last=NOW)
    assert outcome.success
    assert status(deployment, run_id) == (dg.DagsterRunStatus.FAILURE, "FAILED")


def test_a_run_that_has_just_started_is_not_given_up(deployment: Deployment) -> None:
    run_id = started(deployment)
    assert not tick(deployment).run_requests
    assert status(deployment, run_id)[0] is dg.DagsterRunStatus.STARTED


def test_a_run_holds_its_lock_as_long_as_it_works_and_not_longer(deployment: Deployment) -> None:
    seen = []

    def listen(event: dg.EventLogEntry) -> None:
        if event.dagster_event_type is dg.DagsterEventType.STEP_SUCCESS:
            with connect(deployment.url) as conn:
                seen.append(runs.living(conn, [event.run_id]) == {event.run_id})

    ingestion = deployment.ingestion()
    (windows,) = ingestion.find_due(first=NOW, last=NOW)
    outcome = ingestion.load(windows, refresh=Refresh.MISSING, triggered_by="test", listener=listen)
    assert seen == [True] * 3
    with connect(deployment.url) as conn:
        assert runs.living(conn, [outcome.run_id]) == frozenset()
