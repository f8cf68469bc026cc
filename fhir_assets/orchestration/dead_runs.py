"""Dead runs: runs that Dagster lists as unfinished although their process has ended.

A started run holds an advisory lock in Postgres until its process ends, see ``Warehouse.hold_run``.
"""

from datetime import UTC, datetime, timedelta

import dagster as dg

from fhir_assets.orchestration.command_runs import is_command_run
from fhir_assets.orchestration.jobs import LOADS
from fhir_assets.orchestration.run_requests import UNFINISHED
from fhir_assets.warehouse.ops import runs
from fhir_assets.warehouse.postgres.db.connections import Connection

GRACE = timedelta(minutes=1)
"""The longest time from the start of a run that Dagster launched until the run holds its lock."""


def fail_dead_runs(instance: dg.DagsterInstance, conn: Connection) -> None:
    """Mark dead runs as failed, in Dagster and in ``ops.ingestion_runs``, and commit.

    Otherwise a dead run would count as unfinished forever and keep its slots in the pool ``fhir_server``.
    """
    runs.abandon_dead(conn)
    unconfirmed = [
        record.dagster_run
        for job in LOADS
        for record in instance.get_run_records(dg.RunsFilter(job_name=job, statuses=UNFINISHED))
        if _must_hold_lock(record)
    ]
    living = runs.find_alive(conn, [run.run_id for run in unconfirmed])
    conn.commit()
    for run in unconfirmed:
        latest = instance.get_run_by_id(run.run_id)
        if run.run_id not in living and latest is not None and not latest.is_finished:
            instance.report_run_failed(run, "The process of this run has ended: it was killed, or it crashed.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def _must_hold_lock(record: dg.RunRecord) -> bool:
    run = record.dagster_run
    if is_command_run(run):
        return True  # `fhir-assets` takes the lock before it creates the run.
    is_running = run.status in (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING)
    return is_running and record.update_timestamp.replace(tzinfo=UTC) < datetime.now(UTC) - GRACE
