"""Runs on Celery workers: a run launcher that sends runs to Celery, and the Celery app of ``fhir-assets worker``.

A worker executes one run after the other and keeps no state: its results are in the store and in Postgres. It
acknowledges a message when the run has ended. If a worker dies before a run has started, the broker gives the message
to another worker; if it dies later, Dagster's daemon starts the run again, on any worker. If the broker loses a
message, ``resend_lost_runs`` sends it again.

Each message is a run. With dagster-celery's executor each message would be a step: it needs a process for each run, and
a message and an execution plan for each of the 90 steps of a window, many of which take milliseconds.
"""

import ctypes
import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from threading import Thread
from typing import Any

import dagster as dg
from celery import Celery
from dagster_celery.config import TASK_EXECUTE_JOB_NAME
from dagster_celery.launcher import CeleryRunLauncher
from dagster_celery.make_app import make_app
from dagster_celery.tags import DAGSTER_CELERY_QUEUE_TAG

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.dagster_internals import (
    CheckRunHealthResult,
    LaunchRunContext,
    WorkerStatus,
    execute_run,
    read_run_id,
)
from fhir_assets.orchestration.dead_runs import explain_dead_run
from fhir_assets.orchestration.instance import lost_messages
from fhir_assets.orchestration.instance.redis_transport import use_tolerant_transport
from fhir_assets.retries import RetryPolicy
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.ops import liveness

QUEUE = "dagster"
"""The Celery queue of runs."""

REDELIVERY_SECONDS = 600
"""The time after which the broker gives a message without acknowledgement to another worker.

The other worker ignores the message if the run has started.
"""

SENT_AGAIN_TAG = "fhir_assets/sent_again"
"""How often a run was sent again because its message was lost."""

MAX_SENT_AGAIN = 3

_LAUNCHED = (dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.CANCELING)
"""The states of a run whose message Dagster has sent and that has not begun."""

_CANCELLATION_CHECK_SECONDS = 5.0
"""The interval at which a worker checks whether its run is being cancelled."""

_DATABASE_WAIT = RetryPolicy(first_wait=0.5, max_wait=10, budget=300)
"""How long a worker waits for the database before it begins a run. Then the run's message is lost, and sent again."""

GRACE = timedelta(minutes=1)
"""The time that a run may take from its start until it holds its lock."""

_log = logging.getLogger(__name__)


class Launcher(CeleryRunLauncher):
    """dagster-celery's run launcher, which also detects killed workers: their runs no longer hold an advisory lock."""

    supports_resume_run = False
    """False: a new run loads what is missing, so there is no need to resume a run at its failed step."""

    def resend_lost_runs(self, waiting: Sequence[dg.DagsterRun]) -> None:
        """Send runs again that wait for a worker but that no message of the broker names, at most MAX_SENT_AGAIN times.

        If another process sends the same run at the same time, one of the two messages is ignored, because a worker
        executes a run only if no other one does.
        """
        by_queue: dict[str, list[dg.DagsterRun]] = {}
        for run in waiting:
            by_queue.setdefault(run.tags.get(DAGSTER_CELERY_QUEUE_TAG, QUEUE), []).append(run)
        for queue, runs_of_queue in by_queue.items():
            lost = lost_messages.find_without_message(self.celery, queue, [run.run_id for run in runs_of_queue])
            for run in runs_of_queue:
                if run.run_id in lost:
                    self._send_again(run)

    def _send_again(self, run: dg.DagsterRun) -> None:
        sent_before = int(run.tags.get(SENT_AGAIN_TAG, "0"))
        if sent_before >= MAX_SENT_AGAIN:
            self._instance.report_run_failed(
                run,
                "No worker began this run, although it was sent again: look at the logs of `fhir-assets worker`, then "
                "execute the run again.",
            )
            return
        self._instance.report_engine_event(
            "The message of this run is no longer in the broker, which lost it in a restart, or gave it to a worker "
            "that could not execute it. It is sent again.",
            run,
            cls=type(self),
        )
        self._instance.add_run_tags(run.run_id, {SENT_AGAIN_TAG: str(sent_before + 1)})
        self.launch_run(LaunchRunContext(run, workspace=None))

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Return whether the worker of a run is alive. Dagster's daemon calls this for every run that has started."""
        record = self._instance.get_run_record_by_id(run.run_id)
        if run.status is not dg.DagsterRunStatus.STARTED or record is None:
            return super().check_run_worker_health(run)
        if record.update_timestamp.replace(tzinfo=UTC) > datetime.now(UTC) - GRACE:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        # The daemon's login may have no right on a table.
        with Warehouse(load_settings()).connect_to_locks() as conn:
            if run.run_id in liveness.find_alive(conn, [run.run_id]):
                return CheckRunHealthResult(WorkerStatus.RUNNING)
            return CheckRunHealthResult(WorkerStatus.FAILED, explain_dead_run(self._instance, conn, run.run_id))


def build_app(settings: Settings) -> Celery:
    """Return the Celery app of the workers.

    A worker reserves one message at a time, so that no message waits behind a long run. It takes neither objects of
    Python nor commands from the broker. Raises ConfigurationError if CELERY_BROKER_URL is not set.
    """
    use_tolerant_transport(QUEUE)
    app = make_app(  # type: ignore[no-untyped-call]
        {
            "broker": settings.require_broker(),
            "backend": settings.require_broker(),
            "config_source": {
                "worker_prefetch_multiplier": 1,
                "accept_content": ["json"],
                "worker_enable_remote_control": False,
                "task_acks_late": True,
                "broker_transport_options": {"visibility_timeout": REDELIVERY_SECONDS},
                "worker_hijack_root_logger": False,
                "broker_connection_retry_on_startup": True,
            },
            "task_default_queue": QUEUE,
        }
    )
    app.task(_execute_message, name=TASK_EXECUTE_JOB_NAME, track_started=True)
    return app


def _execute_message(execute_job_args_packed: Any) -> int:
    """Execute the run of a launcher's message until it ends or is cancelled. Return its exit code.

    The run executes in its own thread. In the main thread Dagster would handle SIGTERM as a cancellation; in this way
    Celery handles it: the worker finishes the run and exits. A process for each run would take about a second more.

    A message is no order, because everybody who reaches the broker can write one: only its run id is read, and the run
    must be one that Dagster's database says is being started.
    """
    try:
        run_id = read_run_id(execute_job_args_packed)
    except Exception:  # Dagster's deserializer raises what it likes.
        _log.warning("a message of the broker names no run and is ignored: someone else writes to the queue")
        return 0
    warehouse = Warehouse(load_settings())
    warehouse.wait(_DATABASE_WAIT, _log)
    with warehouse.take_run(run_id) as is_taken, dg.DagsterInstance.get() as instance:
        if not is_taken:
            return 0
        run = instance.get_run_by_id(run_id)
        if run is None or run.status not in _LAUNCHED:
            _log.warning("a message of the broker names a run that is not being started, and is ignored")
            return 0
        exit_codes: list[int] = []

        def execute() -> None:
            exit_codes.append(execute_run(run_id, instance))

        thread = Thread(target=execute, name="run")
        thread.start()
        while thread.is_alive():
            thread.join(_CANCELLATION_CHECK_SECONDS)
            if _is_being_cancelled(instance, run_id):
                _interrupt(thread)
        return exit_codes[0] if exit_codes else 1


def _is_being_cancelled(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Return whether a run is being cancelled, False if Dagster's database cannot be asked.

    An error would end the message while its run goes on in its thread, beside the run of the next message.
    """
    try:
        run = instance.get_run_by_id(run_id)
    except Exception as error:  # Dagster's storage raises the errors of its driver.
        _log.warning(
            "Dagster's database could not be asked whether a run is being cancelled",
            extra={"run": run_id, "reason": type(error).__name__},
        )
        return False
    return run is not None and run.status is dg.DagsterRunStatus.CANCELING


def _interrupt(thread: Thread) -> None:
    """Raise Dagster's exception for a cancelled run in ``thread``, at the next Python instruction that it executes."""
    if thread.ident is not None:
        error = ctypes.py_object(dg.DagsterExecutionInterruptedError)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), error)
