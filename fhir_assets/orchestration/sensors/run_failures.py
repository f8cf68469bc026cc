"""The sensor ``record_failed_runs``: ends the steps of crashed runs, in Dagster and in ``ops.ingestion_runs``."""

import dagster as dg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.failures import sanitized_errors
from fhir_assets.orchestration.run_ends import complete_failure, read_reason
from fhir_assets.warehouse.ops import runs


def build_run_failure_sensor(warehouse: Warehouse) -> dg.SensorDefinition:
    """Return the sensor that changes the steps of a failed run from RUNNING to FAILED in ``ops.ingestion_runs``."""

    @dg.run_failure_sensor(
        name="record_failed_runs",
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Changes the steps of a failed run from RUNNING to FAILED in ops.ingestion_runs.",
    )
    def record_failed_runs(context: dg.RunFailureSensorContext) -> None:
        run = context.dagster_run
        with sanitized_errors():
            reason = complete_failure(context.instance, run, context.failure_event.message)
            with warehouse.connect() as conn:
                runs.abandon(conn, run.run_id, error=read_reason(context.instance, run.run_id) or reason)

    return record_failed_runs
