"""Loads of posts. They run in this process, with the same steps as Dagster's job ``load_received``.

A load takes the same locks as the job, and records the same counts, dead letters, consent decisions and audit records.
It does not count towards FHIR_MAX_LOADERS, so that it does not wait for a long load. Posts that it does not load stay
in ``ops.received``, where the sensor ``load_received`` finds them.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import groupby
from math import inf
from time import monotonic
from uuid import uuid4

import psycopg

from fhir_assets.catalog import LOAD_ORDER
from fhir_assets.deployment.landing import build_landing_step
from fhir_assets.deployment.sources import build_binding
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.validation import build_validator
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError, ViewError
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.settings import Settings
from fhir_assets.steps.loads import (
    hold_for_delivery,
    load_windows,
    name_delivery_destination,
    validate_windows,
)
from fhir_assets.steps.records import StepFailed, record_step
from fhir_assets.steps.run_context import RunContext
from fhir_assets.warehouse.ops import checkpoints, received, runs
from fhir_assets.warehouse.ops.received import PostedWindow
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets.windows import Window, WindowRange

MAX_ROWS = 20_000
"""The maximum number of waiting resources in a window, posted or not. Dagster's job loads windows with more."""

MAX_WINDOWS = 100
"""The maximum number of windows in a load. Further windows are in the next load."""

TRIGGER = "posts"
"""The trigger of loads of posts in ``ops.ingestion_runs`` and in the audit log."""

LEFT_SECONDS = 60.0
"""The seconds until the post loader tries again to load a window whose load failed repeatedly."""

BIG_SECONDS = 5.0
"""The seconds until the post loader looks again at a window with too many waiting resources."""

_RETRY_SECONDS = (0.5, 2.0)
"""The seconds before the second and the third attempt to load a window."""

_log = logging.getLogger(__name__)

WindowKey = tuple[str, str]
"""A resource type and a partition key."""


@dataclass(frozen=True, slots=True)
class PostLoad:
    """A committed load of posts of one resource type."""

    run_id: str
    resource_type: str
    posted: Mapping[str, int]
    """The number of posted resources by partition key."""
    counts: Mapping[str, Mapping[str, int]]
    """The counts of the run in ``ops.ingestion_runs``, by partition key and name."""
    resolved_windows: Sequence[str]
    """Other windows whose dead letters were resolved."""


class PostLoads:
    """Receives posted files, and loads posted resources that wait.

    ``views`` are the views of the deployment.
    """

    def __init__(self, settings: Settings, warehouse: Warehouse, views: Sequence[View]) -> None:
        self._settings = settings
        self._warehouse = warehouse
        self._views = views
        self._loaded_types = {view.resource_type for view in views}.intersection(settings.fhir_resource_types)
        self._store = build_store(settings)
        self._validator = build_validator(settings)
        self._workers = WorkerPool(settings.workers)
        self._binding = build_binding(settings, warehouse, self._store)
        self._landing = build_landing_step(settings, warehouse) if settings.fhir_landing_url else None
        self._failures: dict[WindowKey, int] = {}
        self._postponed: dict[WindowKey, float] = {}
        self._left: set[WindowKey] = set()

    def create_tables(self) -> None:
        """Create the tables that do not exist. The first load of posts would otherwise wait for a load in progress.

        Errors are ignored here; the load of the type reports them.
        """
        views = [view for view in self._views if view.resource_type in self._loaded_types]
        with (
            self._warehouse.connect() as conn,
            suppress(ViewError, ConfigurationError, psycopg.Error),
            conn.transaction(),
        ):
            view_tables.ensure_tables(conn, views)

    def receive_files(self) -> None:
        """Receive the posted files of visits from the landing zone. Raises the same errors as ``LandingStep.run``."""
        if self._landing:
            self._landing.run_posted(str(uuid4()))

    def run(self) -> Iterator[PostLoad | None]:
        """Load the waiting posts, with one load for each resource type. Yield None for a load that failed.

        Consents are loaded first, so that they apply to the resources of the other types. Raises DatabaseUnavailable
        and StoreError.
        """
        with self._warehouse.connect() as conn:
            found = received.find_posted(conn)
        self._forget_loaded_windows({(window.resource_type, window.partition_key) for window in found})
        waiting = [window for window in found if self._is_due(window)]
        waiting.sort(key=lambda window: _order(window.resource_type))
        for name, windows in groupby(waiting, key=lambda window: window.resource_type):
            if chosen := self._choose(name, list(windows)):
                yield self._load(name, chosen)

    @property
    def seconds_to_next_attempt(self) -> float:
        """The seconds until a postponed window is due; infinite if none is."""
        return max(0.0, min(self._postponed.values(), default=inf) - monotonic())

    def _forget_loaded_windows(self, waiting: Set[WindowKey]) -> None:
        """Forget the failures of windows without waiting posts, which Dagster's job has loaded in the meantime."""
        self._left &= waiting
        for by_window in (self._failures, self._postponed):
            for key in by_window.keys() - waiting:
                del by_window[key]

    def _is_due(self, window: PostedWindow) -> bool:
        """Return whether to load a window now: its type and its length match the settings, and it is not postponed."""
        if window.resource_type not in self._loaded_types or self._find_window(window.partition_key) is None:
            return False
        return self._postponed.get((window.resource_type, window.partition_key), 0.0) <= monotonic()

    def _find_window(self, partition_key: str) -> Window | None:
        scheme = self._settings.window_scheme
        try:
            window = scheme.window(partition_key)
        except ValueError:
            return None
        return window if scheme.window_at(window.end - timedelta(microseconds=1)) == window else None

    def _choose(self, name: str, windows: Sequence[PostedWindow]) -> list[PostedWindow]:
        """Return the windows of the next load. Those with too many resources are left to Dagster's job."""
        rows_by_key = self._count_waiting(name, [window.partition_key for window in windows])
        chosen: list[PostedWindow] = []
        total = 0
        for window in windows:
            rows = rows_by_key.get(window.partition_key, 0)
            if rows > MAX_ROWS:
                reason = f"the window has {rows:,} waiting resources: over {MAX_ROWS:,}"
                self._leave_to_job(name, window.partition_key, reason, seconds=BIG_SECONDS)
            elif len(chosen) < MAX_WINDOWS and total + rows <= MAX_ROWS:
                chosen.append(window)
                total += rows
        return chosen

    def _count_waiting(self, name: str, partition_keys: Sequence[str]) -> dict[str, int]:
        """Return the numbers of resources that a load of these windows would validate or load."""
        views = [view.name for view in self._views if view.resource_type == name]
        with self._warehouse.connect() as conn:
            loaded = checkpoints.get_loaded_parts(conn, name, partition_keys, views=views)
        validated = {item.partition_key: item for item in self._store.manifests("validated", name, partition_keys)}
        rows_by_key: dict[str, int] = {}
        for raw in self._store.manifests("raw", name, partition_keys):
            key = raw.partition_key
            existing = validated.get(key)
            state = existing.validated if existing else None
            done = state.inputs if state and state.rules_version == self._validator.rules_version else ()
            names = frozenset(done)
            rows = sum(part.rows for part in raw.parts if part.name not in names)
            known = loaded.get(key, frozenset())
            rows += sum(part.rows for part in (existing.parts if existing else ()) if part.name not in known)
            rows_by_key[key] = rows
        return rows_by_key

    def _load(self, name: str, windows: Sequence[PostedWindow]) -> PostLoad | None:
        keys = [window.partition_key for window in windows]
        run = RunContext(
            str(uuid4()),
            WindowRange([self._settings.window_scheme.window(key) for key in keys]),
            Refresh.MISSING,
            TRIGGER,
            datetime.now(UTC),
        )
        warehouse = self._warehouse
        try:
            with warehouse.hold_run(run.run_id), record_step(run, warehouse, [name], check=self._binding.require):
                resolved_windows = self._validate_and_load(run, name)
        except StepFailed as failure:
            self._record_failure(name, keys, failure.reason)
            return None
        with warehouse.connect() as conn:
            counts = runs.find_counts(conn, run.run_id, name, keys)
        for key in keys:
            if any(counts.get(key, {}).values()):
                self._failures.pop((name, key), None)
                self._postponed.pop((name, key), None)
            else:
                self._record_failure(name, [key], "the load found no resources in the window")
        posted = {window.partition_key: window.rows for window in windows}
        return PostLoad(run.run_id, name, posted, counts, resolved_windows)

    def _validate_and_load(self, run: RunContext, name: str) -> list[str]:
        """Validate and load the windows of a run. Return other windows whose dead letters were resolved."""
        warehouse, store = self._warehouse, self._store
        validate_windows(store, warehouse, self._workers, self._validator, run, name)
        hold_for_delivery(warehouse, self._destination, run, name, run.partition_keys)
        loaded = load_windows(
            self._settings,
            store,
            warehouse,
            self._workers,
            run,
            name,
            selected=[view for view in self._views if view.resource_type == name],
            all_views=self._views,
            waits_for_slot=False,
        )
        return sorted(loaded.resolved_windows.difference(run.partition_keys))

    @cached_property
    def _destination(self) -> str:
        return name_delivery_destination(self._settings)

    def _record_failure(self, name: str, partition_keys: Sequence[str], reason: str) -> None:
        """Postpone the windows of a load that failed. After the last attempt, leave them to Dagster's job."""
        for key in partition_keys:
            attempts = self._failures.get((name, key), 0)
            if attempts < len(_RETRY_SECONDS):
                self._failures[name, key] = attempts + 1
                self._postponed[name, key] = monotonic() + _RETRY_SECONDS[attempts]
            else:
                self._leave_to_job(name, key, reason, seconds=LEFT_SECONDS)

    def _leave_to_job(self, name: str, partition_key: str, reason: str, *, seconds: float) -> None:
        """Leave the posts of a window to Dagster's job, with one warning until all of them are loaded."""
        window = (name, partition_key)
        self._failures.pop(window, None)
        self._postponed[window] = monotonic() + seconds
        if window not in self._left:
            self._left.add(window)
            _log.warning(
                "posts are left to the job load_received",
                extra={"types": [name], "window": partition_key, "reason": reason},
            )


def _order(resource_type: str) -> tuple[bool, int]:
    return resource_type != "Consent", LOAD_ORDER[resource_type]
