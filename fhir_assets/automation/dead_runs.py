"""Runs whose process is gone: neither `fhir-assets ingest` nor a code server can say any more that they ended."""

from datetime import UTC, datetime, timedelta

import dagster as dg

from fhir_assets.automation.jobs import INCREMENTAL_LOAD
from fhir_assets.warehouse import runs
from fhir_assets.warehouse.database import Connection

_GRACE = timedelta(minutes=1)
"""How long a run may take from its start until it holds its lock."""


def give_up_dead_runs(instance: dg.DagsterInstance, conn: Connection) -> None:
    """What dead runs left RUNNING in ``ops.ingestion_runs`` is FAILED, and so are the runs themselves in Dagster,
    which would else count as unfinished for ever. Commits.
    """
    runs.abandon_dead(conn)
    started = [
        record.dagster_run
        for record in instance.get_run_records(
            dg.RunsFilter(
                job_name=INCREMENTAL_LOAD,
                statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING],
                updated_before=datetime.now(UTC) - _GRACE,
            )
        )
    ]
    living = runs.living(conn, [run.run_id for run in started])
    conn.commit()
    for run in started:
        if run.run_id not in living:
            instance.report_run_failed(run, "The process of this run is gone: killed, or crashed.")
