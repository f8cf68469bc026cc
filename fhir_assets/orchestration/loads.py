"""The load of one resource type, with consent. The assets ``normalized/<view>`` and the post loader call it."""

from collections.abc import Sequence
from contextlib import nullcontext

from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.views import View
from fhir_assets.orchestration.consent import apply_consent
from fhir_assets.orchestration.run_context import RunContext
from fhir_assets.pipeline.load.conditional_references import ConditionalReferenceStep
from fhir_assets.pipeline.load.step import LoadResult, LoadStep
from fhir_assets.pipeline.replay.load_step import ReplayLoadStep
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.settings import Settings
from fhir_assets.storage.store import Store


def load_windows(
    settings: Settings,
    store: Store,
    warehouse: Warehouse,
    workers: WorkerPool,
    run: RunContext,
    resource_type: str,
    *,
    selected: Sequence[View],
    all_views: Sequence[View],
    waits_for_slot: bool = True,
) -> LoadResult:
    """Load the windows of a run into the ``selected`` views of a type, with consent applied before and after.

    ``all_views`` are the views of the deployment. ``waits_for_slot`` states whether the load counts towards
    FHIR_MAX_LOADERS. Raises as ``LoadStep.run`` and ``ConsentStep.run``.
    """
    gate = build_consent_gate(settings)
    complete = len(selected) == sum(view.resource_type == resource_type for view in all_views)
    step = LoadStep(
        store,
        warehouse.connect,
        selected,
        all_views=complete,
        run_id=run.run_id,
        refresh=run.refresh,
        workers=workers,
        consent_gate=gate,
    )
    apply_consent(settings, warehouse, all_views, run)
    with warehouse.table_loads.slot() if waits_for_slot else nullcontext():
        loaded = step.run(resource_type, run.windows.windows)
    if run.replay and complete:
        replay = ReplayLoadStep(
            warehouse.connect, selected, run_id=run.run_id, also_open=run.replay == "open", consent_gate=gate
        )
        with warehouse.table_loads.slot():
            replay.run(resource_type, run.windows.windows)
    released = apply_consent(settings, warehouse, all_views, run).released
    if loaded.resources or run.replay or released:
        ConditionalReferenceStep(warehouse.connect, all_views, run_id=run.run_id, consent_gate=gate).run()
    return loaded
