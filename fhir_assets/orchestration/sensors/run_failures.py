"""The sensor ``record_failed_runs``: marks the steps of crashed runs as FAILED in ``ops.ingestion_runs``."""

import dagster as dg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.run_ends import read_reason
from fhir_assets.warehouse.ops import liveness, runs


def build_run_failure_sensor(warehouse: Warehouse) -> dg.SensorDefinition:
    """Return the sensor that changes the steps of a failed run from RUNNING to FAILED in ``ops.ingestion_runs``."""

    @dg.run_failure_sensor(
        name="record_failed_runs",
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Changes the steps of a failed run from RUNNING to FAILED in ops.ingestion_runs.",
    )
    def record_failed_runs(context: dg.RunFailureSensorContext) -> None:
        run_id = context.dagster_run.run_id
        reason = read_reason(context.instance, run_id) or context.failure_event.message or liveness.DEAD
        with warehouse.connect() as conn:
            runs.abandon(conn, run_id, error=reason)

    return record_failed_runs
