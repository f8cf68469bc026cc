"""The sensor ``record_failed_runs``: closes the account of a run that crashed."""

import dagster as dg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.warehouse.ops import runs


def build_run_failure_sensor(warehouse: Warehouse) -> dg.SensorDefinition:
    """Return the sensor that marks the steps of a failed run as FAILED where ``ops.ingestion_runs`` has RUNNING."""

    @dg.run_failure_sensor(
        name="record_failed_runs",
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Marks the steps of a crashed run as FAILED where ops.ingestion_runs has RUNNING.",
    )
    def record_failed_runs(context: dg.RunFailureSensorContext) -> None:
        with warehouse.connect() as conn:
            runs.abandon(conn, context.dagster_run.run_id, error="the run ended before this step did")

    return record_failed_runs
