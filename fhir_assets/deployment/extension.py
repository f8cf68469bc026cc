"""Extends the windows of a deployment without a run, and finds the resource types that need a run."""

from datetime import datetime

from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.source import open_history
from fhir_assets.deployment.validation import build_validator
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.source import Source
from fhir_assets.fhir.views import ViewSet
from fhir_assets.pipeline.consent.due import has_due_decisions
from fhir_assets.pipeline.fetch.extend import ExtendStep, LayerRules
from fhir_assets.settings import Settings
from fhir_assets.storage.store import Store
from fhir_assets.windows import WindowRange


def extend_idle_types(
    settings: Settings,
    source: Source,
    store: Store,
    warehouse: Warehouse,
    views: ViewSet,
    windows: WindowRange,
    *,
    now: datetime,
    seconds: float,
    verified: bool = False,
) -> list[str]:
    """Extend the windows of the types to which the source has added nothing. Return the other types.

    All types are returned if the source is read as a whole (files, bulk exports), or if consent decisions have to be
    applied. ``verified`` is an argument of ``ExtendStep``, and ``seconds`` one of ``ExtendStep.run``. Raises the errors
    of ``ExtendStep.run``.
    """
    types = list(settings.fhir_resource_types)
    with warehouse.connect() as conn:
        waits = has_due_decisions(conn, build_consent_gate(settings), now)
    if source.one_pass or waits:
        return types
    rules = LayerRules(
        build_validator(settings).rules_version,
        views.views,
        delivery_url=settings.fhir_delivery_url,
        export_url=settings.fhir_export_url,
    )
    step = ExtendStep(
        source,
        store,
        warehouse.connect,
        rules,
        now=now,
        overlap=settings.overlap,
        history=open_history(settings, warehouse),
        verified=verified,
    )
    return step.run(types, windows, seconds=seconds)
