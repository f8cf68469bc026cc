"""Dead runs: runs that Dagster lists as unfinished although their process has ended, or will never begin.

A started run holds an advisory lock in Postgres until its process ends, see ``Warehouse.hold_run``.
"""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Protocol, runtime_checkable

import dagster as dg

from fhir_assets.orchestration.command_runs import is_command_run
from fhir_assets.orchestration.jobs import LOADS
from fhir_assets.orchestration.run_ends import explain_lost_lock, fail_open_steps, read_process_end, read_reason
from fhir_assets.orchestration.run_processes import find_process
from fhir_assets.orchestration.run_requests import UNFINISHED
from fhir_assets.warehouse.ops import liveness, runs
from fhir_assets.warehouse.postgres.db.connections import Connection

GRACE = timedelta(minutes=1)
"""The longest time from the start of a run that Dagster launched until the run holds its lock."""


_log = logging.getLogger(__name__)


@runtime_checkable
class ResendingLauncher(Protocol):
    """A run launcher whose messages can be lost."""

    def resend_lost_runs(self, waiting: Sequence[dg.DagsterRun]) -> None:
        """Send runs again that wait for a worker but whose message is lost."""


def resend_lost_runs(instance: dg.DagsterInstance) -> None:
    """Send the runs again that were launched but whose message the broker has lost.

    Otherwise such a run would count as unfinished forever. A broker that cannot be reached is asked again by the next
    call.
    """
    launcher = instance.run_launcher
    if not isinstance(launcher, ResendingLauncher):
        return
    earliest = datetime.now(UTC) - GRACE
    records = instance.get_run_records(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTING]))
    waiting = [record.dagster_run for record in records if record.update_timestamp.replace(tzinfo=UTC) < earliest]
    if not waiting:
        return
    try:
        launcher.resend_lost_runs(waiting)
    except Exception as error:  # Each broker's client has errors of its own.
        _log.warning("the broker could not be asked for the messages of waiting runs (%s)", type(error).__name__)


def fail_dead_runs(instance: dg.DagsterInstance, conn: Connection) -> None:
    """Mark dead runs as failed, in Dagster and in ``ops.ingestion_runs``, commit, and send lost runs again.

    Otherwise a dead run would count as unfinished forever and keep its slots in the pool ``fhir_server``. Both have the
    same reason, which is also logged as a warning.
    """
    reasons = {run_id: explain_dead_run(instance, conn, run_id) for run_id in liveness.find_dead(conn)}
    for run_id, reason in reasons.items():
        runs.abandon(conn, run_id, error=reason)
    unconfirmed = [
        record.dagster_run
        for job in LOADS
        for record in instance.get_run_records(dg.RunsFilter(job_name=job, statuses=UNFINISHED))
        if _must_hold_lock(record)
    ]
    living = liveness.find_alive(conn, [run.run_id for run in unconfirmed])
    conn.commit()
    for run in unconfirmed:
        latest = instance.get_run_by_id(run.run_id)
        if run.run_id not in living and latest is not None and not latest.is_finished:
            reason = reasons.get(run.run_id) or explain_dead_run(instance, conn, run.run_id)
            conn.commit()
            fail_run(instance, run, reason)
    resend_lost_runs(instance)


def fail_run(instance: dg.DagsterInstance, run: dg.DagsterRun, reason: str) -> None:
    """Mark a run as failed in Dagster, with the steps that it has begun, and free its slots in pools."""
    _log.warning("a run has ended", extra={"run": run.run_id, "reason": reason})
    fail_open_steps(instance, run, reason)
    instance.report_run_failed(run, reason)
    instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def explain_dead_run(instance: dg.DagsterInstance, conn: Connection, run_id: str) -> str:
    """Return why a run holds no lock any more, or why it failed if Dagster knows it already."""
    record = instance.get_run_record_by_id(run_id)
    if record is None:
        return liveness.DEAD
    if record.dagster_run.is_finished:
        return read_reason(instance, run_id) or liveness.DEAD
    if (told := read_process_end(instance, run_id)) is not None:
        return told
    begun = datetime.fromtimestamp(record.start_time, UTC) if record.start_time else None
    process = find_process(instance, run_id)
    return explain_lost_lock(process, begun=begun, postgres_started=liveness.get_server_start(conn))


def _must_hold_lock(record: dg.RunRecord) -> bool:
    run = record.dagster_run
    if is_command_run(run):
        return True  # `fhir-assets` takes the lock before it creates the run.
    is_running = run.status in (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING)
    return is_running and record.update_timestamp.replace(tzinfo=UTC) < datetime.now(UTC) - GRACE
