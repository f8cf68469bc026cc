"""Sensors."""

import dagster as dg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.warehouse.ops import runs


def record_failed_runs(warehouse: Warehouse) -> dg.SensorDefinition:
    """Marks what a crashed run left RUNNING in ``ops.ingestion_runs`` as FAILED."""

    @dg.run_failure_sensor(
        name="record_failed_runs",
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Marks what a crashed run left RUNNING in ops.ingestion_runs as FAILED.",
    )
    def record_failed_runs(context: dg.RunFailureSensorContext) -> None:
        with warehouse.connect() as conn:
            runs.abandon(conn, context.dagster_run.run_id, error="the run ended before this step did")

    return record_failed_runs
