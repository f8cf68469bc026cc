"""Applies consent at the beginning of a step, so that data written outside obeys all decisions made until then."""

from collections.abc import Sequence
from datetime import UTC, datetime

from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.consent.step import ConsentResult, ConsentStep
from fhir_assets.settings import Settings
from fhir_assets.steps.run_context import RunContext


def apply_consent(
    settings: Settings, warehouse: Warehouse, all_views: Sequence[View], run: RunContext
) -> ConsentResult:
    """Withhold and release the resources whose decisions are due. ``all_views`` are the views of the deployment.

    Raises DatabaseUnavailable, ViewError or EncryptionError.
    """
    gate = build_consent_gate(settings)
    step = ConsentStep(warehouse.connect, all_views, gate, run_id=run.run_id, actor=run.actor)
    return step.run(datetime.now(UTC))
