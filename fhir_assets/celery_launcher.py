"""Runs on other machines: Dagster's Celery launcher, and the Celery app that `fhir-assets worker` serves.

A worker takes one run after the other and holds no state: what it has done is in the store and in Postgres, so a run
whose worker was killed is started again by Dagster's daemon, on any other.
"""

from datetime import UTC, datetime, timedelta

import dagster as dg
from celery import Celery
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus
from dagster_celery.launcher import CeleryRunLauncher
from dagster_celery.make_app import make_app
from dagster_celery.tasks import create_execute_job_task, create_resume_job_task

from fhir_assets.resources.warehouse import Warehouse
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse import runs

QUEUE = "dagster"

_GRACE = timedelta(minutes=1)
"""How long a run may take from its start until it holds its lock."""


class Launcher(CeleryRunLauncher):
    """dagster-celery's, which also sees that a worker was killed: the run no longer holds its lock in Postgres."""

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
    """The Celery app of the workers. It reserves one message at a time, lest a killed worker holds up other runs."""
    made = make_app(  # type: ignore[no-untyped-call]
        {
            "broker": settings.require_broker(),
            "backend": settings.require_broker(),
            "config_source": {
                "worker_prefetch_multiplier": 1,
                "worker_hijack_root_logger": False,
                "broker_connection_retry_on_startup": True,
            },
            "task_default_queue": QUEUE,
        }
    )
    create_execute_job_task(made)
    create_resume_job_task(made)
    return made
