"""Reports of loads without assets to Dagster: materializations and check results that belong to no run.

Reporting an event takes about 14 ms, and a post may affect twenty assets. Windows are therefore reported at most once a
second, and less often if reporting takes long. A report that fails is repeated. If a loader is killed before it reports
a window, the window has no verdict, and the next loader reports it.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any

import dagster as dg

from fhir_assets.catalog import BY_NAME, ResourceType
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.views import View
from fhir_assets.orchestration.check_names import DEAD_LETTER_RATE, RECONCILES
from fhir_assets.orchestration.checks.after_load import evaluate_after_load
from fhir_assets.orchestration.checks.window import WindowChecks
from fhir_assets.orchestration.posts.loads import PostLoad, WindowKey
from fhir_assets.orchestration.window_metadata import PARTITION_ROW_COUNT
from fhir_assets.pipeline.reconcile.verdicts import evaluate_windows
from fhir_assets.pipeline.reconcile.window_counts import find_main_view
from fhir_assets.settings import Settings
from fhir_assets.steps.records import describe_error
from fhir_assets.storage.manifest import Manifest
from fhir_assets.warehouse.ops import received
from fhir_assets.warehouse.postgres.tables.view_tables import count_rows_by_window

INTERVAL_SECONDS = 1.0
"""The minimum number of seconds between the starts of two reports."""

MAX_SHARE = 0.2
"""The maximum share of the time that is spent on reports."""

_LONGEST_PAUSE_SECONDS = 60.0
_UNVERIFIED = timedelta(days=1)
_MAX_OTHER_WINDOWS = 100
_DESCRIPTION = "posted, not fetched from the source"

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _WindowReport:
    """The counts of the loads of a window since its last report."""

    loads: int = 0
    posted: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    run_id: str = ""

    def add(self, load: PostLoad, partition_key: str) -> None:
        self.loads += 1
        self.posted += load.posted[partition_key]
        self.counts.update(load.counts.get(partition_key, {}))
        self.run_id = load.run_id

    def merge(self, other: "_WindowReport") -> None:
        self.loads += other.loads
        self.posted += other.posted
        self.counts.update(other.counts)
        self.run_id = other.run_id or self.run_id

    def describe(self) -> dict[str, Any]:
        known = {"loads": self.loads, **self.counts, "last_run_id": self.run_id}
        return known if self.loads else {}


class PostReports:
    """Reports loads of posts in a background thread. ``open_instance`` is called before the first report."""

    def __init__(
        self,
        settings: Settings,
        warehouse: Warehouse,
        views: Sequence[View],
        open_instance: Callable[[], dg.DagsterInstance],
        *,
        description: str = _DESCRIPTION,
    ) -> None:
        self._settings = settings
        self._warehouse = warehouse
        self._views = views
        self._store = build_store(settings)
        self._open_instance = open_instance
        self._description = description
        self._instance: dg.DagsterInstance | None = None
        self._lock = Lock()
        self._waiting: dict[WindowKey, _WindowReport] = {}
        self._resolved: set[WindowKey] = set()
        self._changed = Event()
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="post-reports", daemon=True)

    def start(self) -> None:
        """Start the thread. It first reports what an earlier loader did not report. Raises DatabaseUnavailable."""
        since = datetime.now(UTC) - _UNVERIFIED
        with self._warehouse.connect() as conn:
            found = received.find_unverified_posts(conn, since)
        with self._lock:
            for key in found:
                self._waiting.setdefault(key, _WindowReport())
        self._changed.set()
        self._thread.start()

    def stop(self) -> None:
        """Report the remaining loads in one attempt, and end the thread if it was started."""
        self._stopping.set()
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join()

    def add(self, load: PostLoad) -> None:
        """Queue a load for the next report."""
        with self._lock:
            for key in load.posted:
                self._waiting.setdefault((load.resource_type, key), _WindowReport()).add(load, key)
            self._resolved.update((load.resource_type, key) for key in load.resolved_windows[:_MAX_OTHER_WINDOWS])
        self._changed.set()

    def flush(self) -> bool:
        """Report all queued loads. Return False if a report failed; its loads are queued again."""
        with self._lock:
            self._changed.clear()
            waiting, self._waiting = self._waiting, {}
            resolved, self._resolved = self._resolved, set()
        done = True
        for name in sorted({name for name, _ in waiting.keys() | resolved}):
            reports = {key: report for (type_name, key), report in waiting.items() if type_name == name}
            others = sorted(key for type_name, key in resolved if type_name == name and key not in reports)
            try:
                self._report_type(BY_NAME[name], reports, others)
            except Exception as error:
                done = False
                _log.warning(
                    "loads of posts could not be reported to Dagster: trying again",
                    extra={"types": [name], "reason": describe_error(error)},
                )
                with self._lock:
                    for key, report in reports.items():
                        self._waiting.setdefault((name, key), _WindowReport()).merge(report)
                    self._resolved.update((name, key) for key in others)
        return done

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            self._changed.wait()
            started = monotonic()
            failures = 0 if self.flush() else failures + 1
            seconds = monotonic() - started
            pause = max(INTERVAL_SECONDS, seconds / MAX_SHARE - seconds, float(2**failures) if failures else 0.0)
            self._stopping.wait(min(pause, _LONGEST_PAUSE_SECONDS))
            if failures:
                self._changed.set()
        self.flush()

    def _report_type(self, resource_type: ResourceType, reports: dict[str, _WindowReport], others: list[str]) -> None:
        if self._instance is None:
            self._instance = self._open_instance()
        instance = self._instance
        for event in self._build_materializations(resource_type, reports):
            instance.report_runless_asset_event(event)
        views = [view for view in self._views if view.resource_type == resource_type.name]
        if not any(view.name == resource_type.key for view in views):
            return
        checks = WindowChecks(resource_type, self._settings)
        main_view = find_main_view(views, resource_type.name)
        evaluations: list[dg.AssetCheckEvaluation] = []
        with self._warehouse.connect() as conn:
            for keys, names in ((sorted(reports), (RECONCILES, DEAD_LETTER_RATE)), (others, (DEAD_LETTER_RATE,))):
                if keys:
                    counts = evaluate_windows(conn, self._store, resource_type.name, keys, main_view=main_view)
                    for name in names:
                        evaluations += checks.evaluate_outside_run(instance, conn, counts, name)
            evaluations += evaluate_after_load(instance, conn, self._settings, resource_type, views)
        for evaluation in evaluations:
            instance.report_runless_asset_event(evaluation)

    def _build_materializations(
        self, resource_type: ResourceType, reports: dict[str, _WindowReport]
    ) -> Iterator[dg.AssetMaterialization]:
        """Yield the materializations of all layers of the windows."""
        name, keys = resource_type.name, sorted(reports)
        raw = _by_key(self._store.manifests("raw", name, keys))
        validated = _by_key(self._store.manifests("validated", name, keys))
        views = [view for view in self._views if view.resource_type == name]
        with self._warehouse.connect() as conn:
            rows = count_rows_by_window(conn, views, name, keys)
        for key in keys:
            shown = reports[key].describe()
            if key in raw:
                metadata = {PARTITION_ROW_COUNT: raw[key].rows, "received": reports[key].posted}
                yield self._materialize("raw", resource_type.key, key, metadata)
            if key in validated:
                metadata = {PARTITION_ROW_COUNT: validated[key].rows, **shown}
                yield self._materialize("validated", resource_type.key, key, metadata)
            for view in views:
                metadata = {PARTITION_ROW_COUNT: rows[view.name][key], **shown}
                yield self._materialize("normalized", view.name, key, metadata)

    def _materialize(
        self, layer: str, name: str, partition_key: str, metadata: dict[str, Any]
    ) -> dg.AssetMaterialization:
        return dg.AssetMaterialization(
            [layer, name], partition=partition_key, description=self._description, metadata=metadata
        )


def _by_key(manifests: Sequence[Manifest]) -> dict[str, Manifest]:
    return {manifest.partition_key: manifest for manifest in manifests}
