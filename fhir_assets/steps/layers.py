"""The steps of the three layers: fetch a run's windows into raw, validate them, and load them into the tables.

Each step is committed, and recorded in ``ops.ingestion_runs``, when it returns. The assets of Dagster show the results.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Protocol

from fhir_assets.deployment.source import open_existence_reader, open_history
from fhir_assets.deployment.sources import build_binding
from fhir_assets.deployment.validation import build_validator
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ServerRefused
from fhir_assets.fhir.source import Source
from fhir_assets.fhir.views import View
from fhir_assets.notices import Notice
from fhir_assets.pipeline.deletions.deletion_log import DeletionLog
from fhir_assets.pipeline.deletions.server_history import apply_server_deletions
from fhir_assets.pipeline.fetch.step import FetchStep, RawUpdate
from fhir_assets.pipeline.fetch.vanished import VanishedStep
from fhir_assets.pipeline.load.result import LoadResult
from fhir_assets.pipeline.lost_manifests import require_manifests
from fhir_assets.pipeline.partition_commit import commit_update
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.replay.validate_step import ReplayValidateStep, find_outdated_partitions
from fhir_assets.pipeline.validate.step import ValidatedUpdate, ValidateStep
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.settings import Settings
from fhir_assets.steps.loads import build_validate_step, load_windows
from fhir_assets.steps.progress import ProgressRelay, Report
from fhir_assets.steps.records import record_step, sanitized_errors
from fhir_assets.steps.run_context import RunContext
from fhir_assets.storage.manifest import Manifest
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import dead_letter_resolution, dead_letters, runs

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FetchedType:
    """What a run has fetched and committed of one resource type."""

    update: RawUpdate
    manifests: Sequence[Manifest]
    """The manifests as they were committed, in the order of the windows."""
    is_offered: bool
    """Whether the source has the type. One that it does not have is skipped."""
    deleted: int | None
    """The number of resources that the source has deleted; None if it was not asked."""
    seconds: float
    """The time of the step, which may have fetched other types too."""


@dataclass(frozen=True, slots=True)
class ValidatedType:
    """What a run has validated and committed of one resource type."""

    update: ValidatedUpdate
    manifests: Sequence[Manifest]
    """The manifests as they were committed."""
    counts: Mapping[str, Mapping[str, int | None]]
    """By partition key, the numbers of ``valid`` and ``dead`` resources that the step validated."""
    seconds: float


@dataclass(frozen=True, slots=True)
class LoadedType:
    """What a run has loaded of one resource type."""

    result: LoadResult
    seconds: float


class LayerSteps(Protocol):
    """The steps of a run. Each raises StepFailed, and what interrupts it."""

    def fetch(self, run: RunContext, resource_types: Sequence[str], report: Report) -> Mapping[str, FetchedType]:
        """Fetch the windows of the types into raw. ``report`` is called with the progress of an export."""
        ...

    def validate(self, run: RunContext, resource_type: str) -> ValidatedType:
        """Validate the raw windows of a type."""
        ...

    def load(self, run: RunContext, resource_type: str, view_names: Sequence[str]) -> LoadedType:
        """Load the valid resources of the windows into the tables of the views."""
        ...


class LocalSteps:
    """Executes the steps in this process.

    ``views`` are the views of the deployment. ``open_source`` is called when a step fetches; its source reports to
    ``progress``.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        warehouse: Warehouse,
        views: Sequence[View],
        open_source: Callable[[], Source],
        progress: ProgressRelay,
    ) -> None:
        self._settings = settings
        self._store = store
        self._warehouse = warehouse
        self._views = views
        self._open_source = open_source
        self._progress = progress
        self._binding = build_binding(settings, warehouse, store)
        self._validator = build_validator(settings)
        self._workers = WorkerPool(settings.workers)

    def fetch(self, run: RunContext, resource_types: Sequence[str], report: Report) -> Mapping[str, FetchedType]:
        """Fetch and commit the windows of the types. A type that the source does not offer is skipped."""
        warehouse, store = self._warehouse, self._store
        started = perf_counter()
        with record_step(run, warehouse, resource_types, check=partial(self._binding.require, fetches=True)):
            source = self._open_source()
            offered = source.list_types()
            available = [name for name in resource_types if offered is None or name in offered]
            step = FetchStep(
                source,
                store,
                run_id=run.run_id,
                now=run.now,
                overlap=self._settings.overlap,
                refresh=run.refresh,
                write_dead_letters=lambda rejected: dead_letters.record_now(warehouse.connect, run.run_id, rejected),
                recorded_before=dead_letter_resolution.next_record_number(warehouse.connect),
            )
            with self._progress.send_to(report):
                updates = {update.resource_type: update for update in step.run(available, run.windows)}
            updates, deleted = self._apply_deletions(run, available, updates)
            seconds = perf_counter() - started
            fetched = {}
            for name in resource_types:
                update = updates.get(name) or RawUpdate(name, (), {})
                for notice in update.notices:
                    _log.warning(notice.message, extra={"resource_type": name, "notice": notice.code})
                manifests = commit_update(warehouse.connect, store, update)
                self._record_fetch(run, update, seconds / len(resource_types))
                fetched[name] = FetchedType(update, manifests, name in available, deleted.get(name), seconds)
        return fetched

    def validate(self, run: RunContext, resource_type: str) -> ValidatedType:
        """Validate and commit the windows of a type, or their dead letters if the run is a replay."""
        warehouse, store = self._warehouse, self._store
        started = perf_counter()
        with sanitized_errors(), warehouse.connect() as conn:
            refusal = runs.find_failure(conn, run.run_id, resource_type)
        with record_step(run, warehouse, [resource_type], check=self._binding.require):
            if refusal:
                raise ServerRefused(refusal)
            raw = store.manifests("raw", resource_type, run.partition_keys)
            with warehouse.connect() as conn:
                require_manifests(conn, store, run.run_id, "raw", resource_type, run.partition_keys, raw)
            step = build_validate_step(store, warehouse, self._workers, self._validator, run)
            if run.replay:
                update, counts = self._replay(run, step, resource_type, raw)
            else:
                update = step.run(resource_type, run.partition_keys)
                counts = _counts(update)
            with warehouse.connect() as conn:
                runs.record_counts(conn, run.run_id, resource_type, counts)
            manifests = commit_update(warehouse.connect, store, update)
        return ValidatedType(update, manifests, counts, perf_counter() - started)

    def load(self, run: RunContext, resource_type: str, view_names: Sequence[str]) -> LoadedType:
        """Load and commit the windows of a type. Its resources are loaded into the named views in one pass."""
        warehouse, store = self._warehouse, self._store
        started = perf_counter()
        with record_step(run, warehouse, [resource_type], check=self._binding.require):
            validated = store.manifests("validated", resource_type, run.partition_keys)
            with warehouse.connect() as conn:
                require_manifests(conn, store, run.run_id, "validated", resource_type, run.partition_keys, validated)
            names = frozenset(view_names)
            result = load_windows(
                self._settings,
                store,
                warehouse,
                self._workers,
                run,
                resource_type,
                selected=[view for view in self._views if view.name in names],
                all_views=self._views,
            )
        return LoadedType(result, perf_counter() - started)

    def _record_fetch(self, run: RunContext, update: RawUpdate, seconds: float) -> None:
        name = update.resource_type
        with self._warehouse.connect() as conn:
            if update.refusal:
                # This step continues with the other types; the step that validates this type fails.
                runs.fail(conn, run.run_id, [name], run.partition_keys, error=update.refusal, seconds=seconds)
            runs.record_counts(
                conn,
                run.run_id,
                name,
                {
                    key: {"server_total": fetch.server_total, "fetched": fetch.new, "dead": fetch.dead}
                    for key, fetch in update.fetches.items()
                },
            )
            if update.before_first_window:
                runs.record_older(conn, run.run_id, name, run.partition_keys[0], update.before_first_window)

    def _apply_deletions(
        self, run: RunContext, resource_types: Sequence[str], updates: Mapping[str, RawUpdate]
    ) -> tuple[dict[str, RawUpdate], dict[str, int]]:
        """Delete resources that the source has deleted.

        They are listed in the source's history, or missing in windows that were fetched again. Return the updates with
        the notices of both steps, and the number of deleted resources by type.
        """
        settings, warehouse, store = self._settings, self._warehouse, self._store
        deletion_log = DeletionLog(store, warehouse.connect)
        deleted: dict[str, int] = {}
        notices: tuple[Notice, ...] = ()
        if history := open_history(settings, warehouse):
            deleted = apply_server_deletions(
                warehouse.connect,
                deletion_log,
                history,
                resource_types,
                run_id=run.run_id,
                now=run.now,
                overlap=settings.overlap,
            )
            notices = history.drain_notices()
        reader = open_existence_reader(settings, warehouse)
        if reader and run.refresh is not Refresh.MISSING:
            step = VanishedStep(warehouse.connect, store, deletion_log, reader, run_id=run.run_id)
            for name, update in updates.items():
                deleted[name] = deleted.get(name, 0) + step.run(update)
            notices = (*notices, *reader.drain_notices(), *step.drain_notices())
        return {name: update.add_notices(notices) for name, update in updates.items()}, deleted

    def _replay(
        self, run: RunContext, step: ValidateStep, resource_type: str, raw: Sequence[Manifest]
    ) -> tuple[ValidatedUpdate, dict[str, dict[str, int | None]]]:
        """Validate dead letters again.

        Partitions whose counts do not match raw or their dead letters are validated completely.
        """
        warehouse, store = self._warehouse, self._store
        replay = ReplayValidateStep(
            store,
            self._validator,
            warehouse.connect,
            run_id=run.run_id,
            now=run.now,
            also_open=run.replay == "open",
        )
        with warehouse.connect() as conn:
            outdated = find_outdated_partitions(conn, store, resource_type, raw)
        update = step.run(resource_type, outdated, revalidated=outdated)
        replayed = replay.run(resource_type, sorted({manifest.partition_key for manifest in raw}.difference(outdated)))
        counts = _counts(update)
        for manifest in replayed.update.manifests:
            key = manifest.partition_key
            counts[key] = {"valid": replayed.resolved[key], "dead": replayed.failed[key]}
        manifests = update.manifests + replayed.update.manifests
        base_manifests = {**update.base_manifests, **replayed.update.base_manifests}
        return ValidatedUpdate(resource_type, manifests, base_manifests, resolution=update.resolution), counts


def _counts(update: ValidatedUpdate) -> dict[str, dict[str, int | None]]:
    return {key: {"valid": counts.valid, "dead": counts.dead} for key, counts in update.counts.items()}
