"""The asset ``missing_references``: resources to which loaded resources refer, fetched by id and loaded in one run.

The job ``backfill`` materializes it after the three layers, so that a backfill of Observations ends with their Patients
in the tables. The job ``fetch_missing_references`` fetches the same resources and leaves their load to other runs.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import dagster as dg

from fhir_assets.catalog import BY_NAME, LOAD_ORDER
from fhir_assets.deployment.landing import build_receiver
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ServerUnavailable
from fhir_assets.fhir.source import Source
from fhir_assets.fhir.validation.validator import Validator
from fhir_assets.fhir.views import View
from fhir_assets.orchestration.failures import sanitized_errors
from fhir_assets.orchestration.jobs import MISSING_REFERENCES
from fhir_assets.orchestration.posts.loads import PostLoad
from fhir_assets.orchestration.posts.reports import PostReports
from fhir_assets.orchestration.run_context import read_run_context
from fhir_assets.orchestration.tags import FHIR_SERVER_POOL
from fhir_assets.pipeline.missing_references.step import MissingReferencesStep, ReadsById
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.settings import Settings
from fhir_assets.steps.loads import (
    hold_for_delivery,
    load_windows,
    name_delivery_destination,
    validate_windows,
)
from fhir_assets.steps.records import record_step
from fhir_assets.steps.run_context import RunContext
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import runs
from fhir_assets.warehouse.ops.received import ReceivedWindow
from fhir_assets.windows import WindowRange

_MAX_ROUNDS = 10
"""The maximum number of rounds. Resources of one round may refer to further missing ones, for example Patients to
Practitioners.
"""

_DESCRIPTION = "fetched as a missing reference"

Windows = dict[str, dict[str, ReceivedWindow]]
"""The windows with received resources by resource type and partition key."""


def build_missing_references(
    settings: Settings, partitions: dg.PartitionsDefinition[str], views: Sequence[View]
) -> dg.AssetsDefinition:
    """Return the asset. Its windows are those of the run that fetched the references of all loaded resources."""
    tables = {view.name for view in views}

    @dg.asset(
        key=MISSING_REFERENCES,
        group_name="raw",
        deps=[["normalized", key] for name in settings.fhir_resource_types if (key := BY_NAME[name].key) in tables],
        partitions_def=partitions,
        backfill_policy=dg.BackfillPolicy.multi_run(settings.fhir_windows_per_run),
        pool=FHIR_SERVER_POOL,
        description="Resources to which loaded resources refer and that were not loaded: fetched from the FHIR server "
        "by id, Patients first, and loaded.",
        kinds={"fhir"},
        required_resource_keys={"source", "store", "warehouse", "workers", "validator"},
    )
    def missing_references(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        source: Source = context.resources.source
        warehouse: Warehouse = context.resources.warehouse
        run = read_run_context(context, settings.window_scheme)
        with sanitized_errors():
            destination = name_delivery_destination(settings)
            # The delivery of this run follows. If this step fails, the next delivery includes the windows.
            _hold_loaded_windows(settings, warehouse, destination, run)
        if not isinstance(source, ReadsById):
            return dg.MaterializeResult(metadata={"skipped": f"{source.name} cannot read resources by id"})
        offered = source.list_types()
        types = [name for name in settings.fhir_resource_types if offered is None or name in offered]
        receiver = build_receiver(settings, warehouse)
        with sanitized_errors():
            receiver.check()
        step = MissingReferencesStep(warehouse.connect, views, types, source, receiver, run_id=run.run_id)
        loads = _Loads(
            settings,
            context.resources.store,
            warehouse,
            context.resources.workers,
            context.resources.validator,
            views,
            replace(run, refresh=Refresh.MISSING, replay=None),
            destination,
        )
        reports = PostReports(settings, warehouse, views, lambda: context.instance, description=_DESCRIPTION)
        asked, found = Counter[str](), Counter[str]()
        with sanitized_errors():
            try:
                for _ in range(_MAX_ROUNDS):
                    types = [name for received in _fetch(step, asked, found) for name in loads.run(received, reports)]
                    if not types:
                        break  # No resource was received: the ids are unknown to the server, or nothing is missing.
            except ServerUnavailable:
                run.request_retry()
                raise
            finally:
                reports.flush()
        return dg.MaterializeResult(metadata={"asked": dict(asked), "found": dict(found)})

    return missing_references


def _hold_loaded_windows(settings: Settings, warehouse: Warehouse, destination: str, run: RunContext) -> None:
    """Record the windows that the run has loaded for the next delivery."""
    for name in settings.fhir_resource_types if destination else ():
        with warehouse.connect() as conn:
            keys = runs.find_loaded_windows(conn, run.run_id, name, run.partition_keys)
        hold_for_delivery(warehouse, destination, run, name, keys or ())


def _fetch(step: MissingReferencesStep, asked: Counter[str], found: Counter[str]) -> Iterator[Windows]:
    """Fetch what is missing, and yield the windows of each batch that was received."""
    for batch in step.run():
        asked[batch.resource_type] += batch.requested
        found[batch.resource_type] += batch.found
        received: Windows = {}
        for window in batch.received.windows:
            received.setdefault(window.resource_type, {})[window.partition_key] = window
        yield received


@dataclass(frozen=True, slots=True)
class _Loads:
    """Validates and loads received windows as steps of ``run``, whose counts include them."""

    settings: Settings
    store: Store
    warehouse: Warehouse
    workers: WorkerPool
    validator: Validator
    views: Sequence[View]
    run_context: RunContext
    destination: str
    """The destination of deliveries in ``ops.held_windows``, or empty."""

    def run(self, received: Windows, reports: PostReports) -> list[str]:
        """Load the windows, those of Consents first. Return the types. Raises StepFailed."""
        names = sorted(received, key=lambda name: (name != "Consent", LOAD_ORDER[name]))
        for name in names:
            reports.add(self._load(name, received[name]))
        return names

    def _load(self, name: str, received: Mapping[str, ReceivedWindow]) -> PostLoad:
        keys = sorted(received)
        scheme = self.settings.window_scheme
        run = replace(self.run_context, windows=WindowRange([scheme.window(key) for key in keys]))
        with self.warehouse.connect() as conn:
            before = runs.find_counts(conn, run.run_id, name, keys)
        with record_step(run, self.warehouse, [name]):
            validate_windows(self.store, self.warehouse, self.workers, self.validator, run, name)
            # The windows are no windows of the run, so its delivery includes them only if they are recorded.
            hold_for_delivery(self.warehouse, self.destination, run, name, keys)
            loaded = load_windows(
                self.settings,
                self.store,
                self.warehouse,
                self.workers,
                run,
                name,
                selected=[view for view in self.views if view.resource_type == name],
                all_views=self.views,
            )
            with self.warehouse.connect() as conn:
                counts = runs.find_counts(conn, run.run_id, name, keys)
                # The run may have loaded the window before; its dead letters are added by record_counts.
                added = {
                    key: {
                        **{count: value for count, value in before.get(key, {}).items() if count != "dead"},
                        "fetched": window.rows + window.rejected,
                        "dead": window.rejected,
                    }
                    for key, window in received.items()
                }
                runs.add_counts(conn, run.run_id, name, added)
        posted = {key: window.rows for key, window in received.items()}
        return PostLoad(run.run_id, name, posted, counts, sorted(loaded.resolved_windows.difference(keys)))
