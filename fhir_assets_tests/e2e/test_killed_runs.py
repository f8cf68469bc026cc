"""The Dagster UI, `ops.ingestion_runs` and alerts say why a run ended whose process was killed or never began."""

import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import dagster as dg
import psutil
import pytest
import yaml
from kubernetes.client import (  # type: ignore[import-untyped]
    V1ContainerState,
    V1ContainerStateTerminated,
    V1ContainerStatus,
    V1Pod,
    V1PodStatus,
)
from pydantic import SecretStr

from fhir_assets.definitions import build_definitions
from fhir_assets.orchestration.jobs import INCREMENTAL_LOAD
from fhir_assets.orchestration.run_ends import complete_failure
from fhir_assets.orchestration.run_processes import find_process
from fhir_assets.sandbox.faults import Fault, FaultKind
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.alerts import AlertsSensor, receive_webhooks
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.daemon import wait_until
from fhir_assets_tests.support.dagster_internals import (
    add_backfill,
    describe_pod,
    get_run_crash_explanation,
    monitor_starting_run,
    start_step,
)
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.deployment_daemon import NEVER, daemon
from fhir_assets_tests.support.killed_runs import Page, command, find_dead_runs, read_errors, wait_for_step
from fhir_assets_tests.support.small_population import START

LOAD = ("ingest", "--from", "2024-01-01", "--to", "2024-01-01")
DAY = "2024-01-01"


@pytest.fixture
def deployment(deploy: Deploy) -> Iterator[Deployment]:
    """A deployment whose FHIR server is slow."""
    with SandboxServer([patient("a", START)], faults=(Fault(kind=FaultKind.SLOW, seconds=3),)) as server:
        yield deploy(
            fhir_base_url=server.url, fhir_resource_types="Patient,Encounter", fhir_last_updated_gte="2024-01-01"
        )


@pytest.mark.slow
def test_a_killed_command_has_a_reason_in_the_ui_in_the_list_of_runs_and_in_the_alert(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with command(deployment, *LOAD) as process:
        run_id = wait_for_step(deployment, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    find_dead_runs(deployment)
    page = Page(deployment, run_id, monkeypatch)
    assert page.status == "FAILURE"
    (reason,) = page.run_reasons
    assert f"process {process.pid} on " in reason
    assert "It was not the kernel's out-of-memory killer" in reason
    assert set(page.step_reasons.values()) == {reason} == set(read_errors(deployment, run_id))
    assert set(page.steps.values()) == {"FAILURE"}
    with receive_webhooks() as hook:
        alerting = deployment.settings.model_copy(update={"alert_webhook_url": SecretStr(hook.url)})
        AlertsSensor(Deployment(alerting, deployment.instance)).tick()
    assert reason in hook.messages[0]["text"]
    assert hook.messages[0]["began"][0]["reason"] == reason


@pytest.mark.slow
def test_a_command_that_is_stopped_by_a_signal_says_so(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    with command(deployment, *LOAD) as process:
        run_id = wait_for_step(deployment, process)
        process.send_signal(signal.SIGTERM)
        process.wait()
    find_dead_runs(deployment)
    page = Page(deployment, run_id, monkeypatch)
    assert page.status == "FAILURE"
    told = "the process of the run received signal 15 (SIGTERM) or 2 (SIGINT, Ctrl-C)"
    assert page.step_reasons
    assert all(told in reason for reason in page.step_reasons.values())
    assert all(told in reason for reason in read_errors(deployment, run_id))


def create_run(deployment: Deployment, status: dg.DagsterRunStatus) -> dg.DagsterRun:
    job = build_definitions(deployment.settings).resolve_job_def(INCREMENTAL_LOAD)
    return deployment.instance.create_run_for_job(job, status=status, tags={"dagster/partition": DAY})


def read_failure(deployment: Deployment, run: dg.DagsterRun) -> str:
    events = deployment.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.RUN_FAILURE)
    (message,) = [event.dagster_event.message for event in events if event.dagster_event]
    return message or ""


def test_a_run_that_cannot_be_launched_says_so(deployment: Deployment) -> None:
    run = create_run(deployment, dg.DagsterRunStatus.NOT_STARTED)
    with pytest.raises(Exception):  # noqa: B017, PT011  # Dagster's launcher has no code location for the run.
        deployment.instance.launch_run(run.run_id, workspace=None)  # type: ignore[arg-type]
    assert read_failure(deployment, run).startswith("The run could not be started (")


def test_a_run_that_dagsters_own_instance_has_failed_gets_the_reason_afterwards(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = deployment.settings.home / "dagster"
    config = yaml.safe_load((folder / "dagster.yaml").read_text())
    del config["instance_class"]
    (folder / "dagster.yaml").write_text(yaml.safe_dump(config))
    with dg.DagsterInstance.from_config(str(folder)) as plain:
        run = create_run(deployment, dg.DagsterRunStatus.STARTED)
        start_step(plain, run, "raw__patient")
        plain.report_engine_event(get_run_crash_explanation(f"Run execution process for {run.run_id}", -15), run)
        plain.report_run_failed(run)
        (failure,) = plain.all_logs(run.run_id, of_type=dg.DagsterEventType.RUN_FAILURE)
        assert failure.dagster_event
        reason = complete_failure(plain, run, failure.dagster_event.message)
    page = Page(deployment, run.run_id, monkeypatch)
    assert reason.startswith("The process of this run was ended by signal 15 (SIGTERM): an operator")
    assert page.step_reasons == {"raw__patient": reason}
    assert reason in page.engine_messages


def test_a_run_that_no_process_begins_says_so(deployment: Deployment) -> None:
    run = create_run(deployment, dg.DagsterRunStatus.NOT_STARTED)
    starting = dg.DagsterEvent(dg.DagsterEventType.RUN_STARTING.value, run.job_name)
    launched = datetime.now(UTC) - timedelta(hours=1)
    deployment.instance.report_dagster_event(starting, run.run_id, timestamp=launched.timestamp())
    monitor_starting_run(deployment.instance, run.run_id)
    assert read_failure(deployment, run).startswith("No process began this run within 180 s")


def test_a_container_of_kubernetes_without_memory_says_so(deployment: Deployment) -> None:
    run = create_run(deployment, dg.DagsterRunStatus.STARTED)
    ended = V1ContainerState(terminated=V1ContainerStateTerminated(exit_code=137, reason="OOMKilled"))
    container = V1ContainerStatus(name="dagster", state=ended, image="", image_id="", ready=False, restart_count=0)
    told = describe_pod(V1Pod(status=V1PodStatus(phase="Failed", container_statuses=[container])))
    health = "Detected run worker status FAILED: 'K8s job failed'. Marking run as failed."
    deployment.instance.report_run_failed(run, f"{health}\n{told}")
    reason = read_failure(deployment, run)
    assert reason.startswith(
        "The container of this run was killed by exit code 137, which is signal 9 (SIGKILL) (OOMKilled), which means "
        "more memory than its limit: give it more memory"
    )
    assert "Dagster says: " in reason


def begin_backfill(deployment: Deployment) -> str:
    """Start a backfill of one window through the daemon, and return its run when a step has begun."""
    add_backfill(deployment.instance, build_definitions(deployment.settings), [DAY], backfill_id="story")
    running = "SELECT run_id FROM ops.ingestion_runs WHERE status = 'RUNNING' LIMIT 1"
    wait_until(lambda: deployment.query(running) != [], seconds=240)
    return str(deployment.query(running)[0][0])


def has_failed(deployment: Deployment, run_id: str, who: str) -> bool:
    """Return whether a run and its rows have failed, or only a step of it, whose run goes on with the others."""
    if who == "step":
        return bool(deployment.instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE))
    run = deployment.instance.get_run_by_id(run_id)
    return run is not None and run.status is dg.DagsterRunStatus.FAILURE and bool(read_errors(deployment, run_id))


@pytest.mark.slow
@pytest.mark.parametrize(("executor", "who"), [("in_process", "run"), ("multiprocess", "step")])
def test_a_killed_process_of_the_daemon_has_its_signal_as_reason(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str, who: str
) -> None:
    with daemon(deployment, tmp_path / "daemon.log", FHIR_SCHEDULE=NEVER, FHIR_EXECUTOR=executor):
        run_id = begin_backfill(deployment)
        process = find_process(deployment.instance, run_id)
        assert process
        psutil.Process(process.pid).kill()
        wait_until(partial(has_failed, deployment, run_id, who), seconds=240)
    page = Page(deployment, run_id, monkeypatch)
    told = f"The process of this {who}"
    reasons = [reason for reason in page.step_reasons.values() if reason.startswith(told)]
    assert reasons
    assert "was killed by signal 9 (SIGKILL), but not by the kernel's out-of-memory killer" in reasons[0]
    if who == "run":
        assert page.run_reasons == [reasons[0]] == read_errors(deployment, run_id)
        assert "IN_PROGRESS" not in page.steps.values()
