"""Runs on other machines: Dagster's Celery launcher, and the Celery app that `fhir-assets worker` serves.

A worker takes one run after the other and holds no state: what it has done is in the store and in Postgres. It gives
the broker its receipt when it has finished a run, so one that dies before a run has begun gives it back; a run that had
begun is started again by Dagster's daemon, on any worker.

Whole runs are handed out, not steps as by dagster-celery's executor: that needs a process a run besides the workers,
and a message and a new execution plan for each of a window's 90 steps, many of which take milliseconds.
"""

import ctypes
from datetime import UTC, datetime, timedelta
from threading import Thread
from typing import Any

import dagster as dg
from celery import Celery
from dagster_celery.config import TASK_EXECUTE_JOB_NAME
from dagster_celery.launcher import CeleryRunLauncher
from dagster_celery.make_app import make_app

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.dagster_internals import (
    CheckRunHealthResult,
    WorkerStatus,
    execute_run,
    read_run_id,
)
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.ops import runs

QUEUE = "dagster"

GIVEN_BACK_SECONDS = 600
"""So long after a worker took a run, and without its receipt, the broker gives the run to another. One that is at work
already is left alone then.
"""

_LOOK_SECONDS = 5.0
"""How often a worker looks whether its run is to be cancelled."""

_GRACE = timedelta(minutes=1)
"""How long a run may take from its start until it holds its lock."""


class Launcher(CeleryRunLauncher):
    """dagster-celery's, which also sees that a worker was killed: the run no longer holds its lock in Postgres."""

    supports_resume_run = False
    """A run is not resumed step by step: a new one loads what is missing."""

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """What Dagster's daemon asks of every run that is at work."""
        record = self._instance.get_run_record_by_id(run.run_id)
        if run.status is not dg.DagsterRunStatus.STARTED or record is None:
            return super().check_run_worker_health(run)
        if record.update_timestamp.replace(tzinfo=UTC) > datetime.now(UTC) - _GRACE:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        with Warehouse(load_settings()).connect() as conn:
            if run.run_id in runs.living(conn, [run.run_id]):
                return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(
            WorkerStatus.FAILED, "The worker of this run is gone: killed, or its machine is down."
        )


def app(settings: Settings) -> Celery:
    """The Celery app of the workers, which take one message at a time, lest others wait behind a long run."""
    made = make_app(  # type: ignore[no-untyped-call]
        {
            "broker": settings.require_broker(),
            "backend": settings.require_broker(),
            "config_source": {
                "worker_prefetch_multiplier": 1,
                "task_acks_late": True,
                "broker_transport_options": {"visibility_timeout": GIVEN_BACK_SECONDS},
                "worker_hijack_root_logger": False,
                "broker_connection_retry_on_startup": True,
            },
            "task_default_queue": QUEUE,
        }
    )
    made.task(_work, name=TASK_EXECUTE_JOB_NAME, track_started=True)
    return made


def _work(execute_job_args_packed: Any) -> int:
    """What a worker does with a message of the launcher: the run, until it has ended or somebody cancels it.

    The run has a thread of its own. In the main one Dagster would take SIGTERM for a cancellation; so it is Celery's,
    which lets the run finish and then ends.
    """
    run_id = read_run_id(execute_job_args_packed)
    with dg.DagsterInstance.get() as instance:
        run = instance.get_run_by_id(run_id)
        if run is None or run.status is dg.DagsterRunStatus.STARTED or run.is_finished:
            return 0
        done: list[int] = []

        def execute() -> None:
            done.append(execute_run(run_id, instance))

        thread = Thread(target=execute, name="run")
        thread.start()
        while thread.is_alive():
            thread.join(_LOOK_SECONDS)
            run = instance.get_run_by_id(run_id)
            if run is not None and run.status is dg.DagsterRunStatus.CANCELING:
                _interrupt(thread)
        return done[0] if done else 1


def _interrupt(thread: Thread) -> None:
    """Have a thread raise, at its next step of Python, what Dagster takes for a cancellation."""
    if thread.ident is not None:
        error = ctypes.py_object(dg.DagsterExecutionInterruptedError)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), error)
