"""Runs whose process is gone: neither `fhir-assets ingest` nor a code server can say any more that they ended."""

from datetime import UTC, datetime, timedelta

import dagster as dg

from fhir_assets.orchestration.jobs import LOADS
from fhir_assets.orchestration.run_requests import UNFINISHED
from fhir_assets.orchestration.tags import TRIGGER_TAG
from fhir_assets.warehouse.ops import runs
from fhir_assets.warehouse.postgres.db.connections import Connection

_GRACE = timedelta(minutes=1)
"""How long a run that a code server started may take until it holds its lock."""


def give_up_dead_runs(instance: dg.DagsterInstance, conn: Connection) -> None:
    """What dead runs left RUNNING in ``ops.ingestion_runs`` is FAILED, and so are the runs themselves in Dagster:
    they would count as unfinished for ever, and keep their places in the pool of the FHIR server. Commits.
    """
    runs.abandon_dead(conn)
    doubtful = [
        record.dagster_run
        for job in LOADS
        for record in instance.get_run_records(dg.RunsFilter(job_name=job, statuses=UNFINISHED))
        if _should_hold_its_lock(record)
    ]
    living = runs.living(conn, [run.run_id for run in doubtful])
    conn.commit()
    for run in doubtful:
        found = instance.get_run_by_id(run.run_id)
        if run.run_id not in living and found is not None and not found.is_finished:
            instance.report_run_failed(run, "The process of this run is gone: killed, or crashed.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def _should_hold_its_lock(record: dg.RunRecord) -> bool:
    run = record.dagster_run
    if TRIGGER_TAG in run.tags:
        return True  # of `fhir-assets`, which locks before it starts a run
    at_work = run.status in (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING)
    return at_work and record.update_timestamp.replace(tzinfo=UTC) < datetime.now(UTC) - _GRACE
