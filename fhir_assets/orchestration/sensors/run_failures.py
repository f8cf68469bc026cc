"""The sensor ``record_failed_runs``: marks the steps of crashed runs as FAILED in ``ops.ingestion_runs``."""

import dagster as dg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.warehouse.ops import runs


def build_run_failure_sensor(warehouse: Warehouse) -> dg.SensorDefinition:
    """Return the sensor that changes the steps of a failed run from RUNNING to FAILED in ``ops.ingestion_runs``."""

    @dg.run_failure_sensor(
        name="record_failed_runs",
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Changes the steps of a failed run from RUNNING to FAILED in ops.ingestion_runs.",
    )
    def record_failed_runs(context: dg.RunFailureSensorContext) -> None:
        with warehouse.connect() as conn:
            runs.abandon(conn, context.dagster_run.run_id, error="the run ended before this step")

    return record_failed_runs
