"""The validation and the load of windows of one resource type, for the steps that do more than one of them.

The assets ``normalized/<view>``, the asset ``missing_references`` and the post loader call them.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from threading import Event

from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.targets import build_delivery_client
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.validation.validator import Validator
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.load.conditional_references import ConditionalReferenceStep
from fhir_assets.pipeline.load.result import LoadResult
from fhir_assets.pipeline.load.step import LoadStep
from fhir_assets.pipeline.partition_commit import commit_update
from fhir_assets.pipeline.replay.load_step import ReplayLoadStep
from fhir_assets.pipeline.validate.step import ValidateStep
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.settings import Settings
from fhir_assets.steps.consent import apply_consent
from fhir_assets.steps.run_context import RunContext
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import held_windows, runs


def build_validate_step(
    store: Store, warehouse: Warehouse, workers: WorkerPool, validator: Validator, run: RunContext
) -> ValidateStep:
    """Return the step that validates the windows of a run."""
    return ValidateStep(
        store,
        validator,
        warehouse.connect,
        run_id=run.run_id,
        now=run.now,
        refresh=run.refresh,
        workers=workers,
    )


def validate_windows(
    store: Store,
    warehouse: Warehouse,
    workers: WorkerPool,
    validator: Validator,
    run: RunContext,
    resource_type: str,
) -> None:
    """Validate and commit the windows of a run, and record the counts. Raises as ``ValidateStep.run``."""
    step = build_validate_step(store, warehouse, workers, validator, run)
    update = step.run(resource_type, run.partition_keys)
    commit_update(warehouse.connect, store, update)
    counts = {key: {"valid": count.valid, "dead": count.dead} for key, count in update.counts.items()}
    with warehouse.connect() as conn:
        runs.record_counts(conn, run.run_id, resource_type, counts)


def name_delivery_destination(settings: Settings) -> str:
    """Return the destination of deliveries in ``ops.held_windows``; empty if nothing is delivered."""
    if not settings.fhir_delivery_url:
        return ""
    with build_delivery_client(settings, workers=1, stop=Event()) as client:
        return f"delivered {client.base_url}"


def hold_for_delivery(
    warehouse: Warehouse, destination: str, run: RunContext, resource_type: str, partition_keys: Sequence[str]
) -> None:
    """Record windows for the next delivery, whatever its windows are: see ``assets/delivered.py``.

    Call it before ``load_windows``. Nothing is recorded if ``destination`` is empty.
    """
    if destination and partition_keys:
        with warehouse.connect() as conn:
            held_windows.hold(conn, destination, resource_type, partition_keys, run_id=run.run_id)


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
    export_url = settings.fhir_export_url
    written_to = held_windows.name_export_destination(export_url) if export_url else ""
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
        written_to=written_to,
    )
    apply_consent(settings, warehouse, all_views, run)
    with warehouse.table_loads.slot() if waits_for_slot else nullcontext():
        loaded = step.run(resource_type, run.windows.windows)
    if written_to:
        _hold_dead_letters(warehouse, written_to, run, resource_type)
    if run.replay and complete:
        replay = ReplayLoadStep(
            warehouse.connect,
            selected,
            run_id=run.run_id,
            also_open=run.replay == "open",
            consent_gate=gate,
            written_to=written_to,
        )
        with warehouse.table_loads.slot():
            replay.run(resource_type, run.windows.windows)
    released = apply_consent(settings, warehouse, all_views, run).released
    if loaded.resources or run.replay or released:
        ConditionalReferenceStep(warehouse.connect, all_views, run_id=run.run_id, consent_gate=gate).run()
    return loaded


def _hold_dead_letters(warehouse: Warehouse, destination: str, run: RunContext, resource_type: str) -> None:
    """Record the windows in which a run has dead letters: they are exported, even if it loaded nothing there."""
    with warehouse.connect() as conn:
        counts = runs.find_counts(conn, run.run_id, resource_type, run.partition_keys)
        dead = [key for key, results in counts.items() if results["dead"]]
        held_windows.hold(conn, destination, resource_type, dead, run_id=run.run_id)
