"""The sensor ``apply_consent``: requests the job ``apply_consent`` when consent decisions change.

A decision changes when the period of a consent begins or ends, and when the consent policy of the settings changes.
"""

from datetime import UTC, datetime

import dagster as dg

from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.failures import sanitized_errors
from fhir_assets.orchestration.jobs import APPLY_CONSENT
from fhir_assets.orchestration.run_requests import UNFINISHED
from fhir_assets.pipeline.consent.due import has_due_decisions
from fhir_assets.settings import Settings

_INTERVAL_SECONDS = 60


def build_consent_sensor(settings: Settings, job: dg.JobDefinition, warehouse: Warehouse) -> dg.SensorDefinition:
    """Return the sensor that requests ``apply_consent`` when the tables no longer match the consents."""

    @dg.sensor(
        job_name=job.name,
        name=APPLY_CONSENT,
        minimum_interval_seconds=_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Requests the job apply_consent when the tables no longer match the consents.",
    )
    def apply_consent(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        with sanitized_errors(), warehouse.connect() as conn:
            due = has_due_decisions(conn, build_consent_gate(settings), datetime.now(UTC))
        if not due:
            return dg.SkipReason("the tables match the consents")
        if context.instance.get_runs_count(dg.RunsFilter(job_name=job.name, statuses=UNFINISHED)):
            return dg.SkipReason(f"a run of {job.name} is not finished yet")
        return dg.RunRequest()

    return apply_consent
