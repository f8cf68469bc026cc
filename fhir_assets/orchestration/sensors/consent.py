"""Consent that changes by itself: periods that begin and end between the runs, and a policy that was switched."""

from datetime import UTC, datetime

import dagster as dg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.views import ViewSet
from fhir_assets.orchestration.run_context import sanitized_errors
from fhir_assets.orchestration.run_requests import UNFINISHED
from fhir_assets.pipeline.consent.step import ConsentStep
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import consents

APPLY_CONSENT = "apply_consent"
_MINUTE = 60


def apply_consent(settings: Settings, views: ViewSet) -> dg.JobDefinition:
    """Brings the tables to what the patients' consents say now."""

    @dg.op(description="Takes back what consent no longer covers, and brings what it now does, with all views.")
    def apply_consent_op(context: dg.OpExecutionContext, warehouse: dg.ResourceParam[Warehouse]) -> None:
        sweep = ConsentStep(
            warehouse.connect, views.views, settings.gate, run_id=context.run_id, actor=f"job:{APPLY_CONSENT}"
        )
        with sanitized_errors():
            swept = sweep.run(datetime.now(UTC))
        context.add_output_metadata(
            {
                "patients": swept.patients,
                "decisions_changed": swept.decisions,
                "resources_withheld": swept.withheld,
                "resources_released": swept.released,
            }
        )

    @dg.job(name=APPLY_CONSENT, executor_def=dg.in_process_executor)
    def job() -> None:
        apply_consent_op()

    return job


def consent_sensor(settings: Settings, job: dg.JobDefinition, warehouse: Warehouse) -> dg.SensorDefinition:
    """Asks for ``apply_consent`` when a period began or ended, or consents came with no run behind them."""

    @dg.sensor(
        job_name=job.name,
        name=APPLY_CONSENT,
        minimum_interval_seconds=_MINUTE,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Asks for the job apply_consent when a decision is due.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        with sanitized_errors(), warehouse.connect() as conn:
            followed = consents.followed(conn)
            waiting = consents.due(conn, datetime.now(UTC), 1) if followed.closed else []
        if followed == settings.gate and not waiting:
            return dg.SkipReason("the tables follow what consent says")
        if context.instance.get_runs_count(dg.RunsFilter(job_name=job.name, statuses=UNFINISHED)):
            return dg.SkipReason("a run is at it")
        return dg.RunRequest()

    return sensor
