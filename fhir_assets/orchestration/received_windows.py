"""Groups windows with received resources (not fetched from the source) into runs, and reports them to Dagster.

The landing zone, the HTTP API, the CSV intake, missing references and corrections write to ``raw`` without a run of its
assets. ``ops.received`` lists the windows that have to be validated and loaded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import dagster as dg

from fhir_assets.catalog import BY_NAME, LOAD_ORDER
from fhir_assets.orchestration.check_names import TABLE_CHECKS
from fhir_assets.orchestration.dagster_internals import AssetGraph
from fhir_assets.orchestration.jobs import MISSING_REFERENCES
from fhir_assets.pipeline.due_windows import group_consecutive_windows
from fhir_assets.pipeline.receive.receiver import Received
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops.received import PendingWindow
from fhir_assets.windows import WindowRange, WindowScheme

AssetKeys = Sequence[dg.AssetKey]

MAX_MATERIALIZATIONS = 1000
"""The largest number of materializations that one receipt reports to Dagster; each event takes milliseconds."""


@dataclass(frozen=True, slots=True)
class ReceivedWindows:
    """Consecutive windows for one run of ``load_received``, with the entries of ``ops.received`` in them."""

    windows: WindowRange
    pending: tuple[PendingWindow, ...]

    @property
    def resource_types(self) -> list[str]:
        """The resource types of the entries, in load order."""
        return sorted({entry.resource_type for entry in self.pending}, key=LOAD_ORDER.__getitem__)

    @property
    def run_key(self) -> str:
        """The first and last window and the number of the attempt, for example ``2024-01-05..2024-01-06/attempt 1``."""
        first, last = self.windows.windows[0].key, self.windows.windows[-1].key
        return f"{first}..{last}/attempt {max(entry.requested_runs for entry in self.pending) + 1}"


def group_windows(settings: Settings, pending: Sequence[PendingWindow]) -> list[ReceivedWindows]:
    """Group the entries of ``ops.received`` into one run for each range of consecutive windows.

    Entries whose resource type or window the settings do not include are left out; they stay in ``ops.received``.
    """
    scheme = settings.window_scheme
    by_key: dict[str, list[PendingWindow]] = {}
    for entry in pending:
        if is_included(settings, entry.resource_type, entry.partition_key):
            by_key.setdefault(entry.partition_key, []).append(entry)
    return [
        ReceivedWindows(
            windows_of_run, tuple(entry for window in windows_of_run.windows for entry in by_key[window.key])
        )
        for windows_of_run in group_consecutive_windows(scheme, by_key)
    ]


def is_included(settings: Settings, resource_type: str, partition_key: str) -> bool:
    """Return whether the settings include a resource type and a window, so that a run can load it."""
    return resource_type in settings.fhir_resource_types and _has_window(settings.window_scheme, partition_key)


def _has_window(scheme: WindowScheme, key: str) -> bool:
    try:
        window = scheme.window(key)
    except ValueError:
        return False
    return scheme.window_at(window.end - timedelta(microseconds=1)) == window


def select_assets(graph: AssetGraph, resource_types: Sequence[str]) -> list[dg.AssetKey]:
    """Return the assets downstream of raw that a load of ``resource_types`` materializes.

    They are validated, normalized, delivered and exports.
    """
    selected = []
    for name in resource_types:
        validated = dg.AssetKey(["validated", BY_NAME[name].key])
        if graph.has(validated):
            downstream = sorted(k for k in graph.get(validated).child_keys if k.path[0] in ("normalized", "delivered"))
            selected += [validated, *downstream]
            exports = dg.AssetKey(["exports", BY_NAME[name].key])
            selected += [exports] if graph.has(exports) else []
    return selected


def select_all_layers(graph: AssetGraph, resource_types: Sequence[str]) -> list[dg.AssetKey]:
    """Return the assets that a run of ``incremental_load`` materializes: raw and those of ``select_assets``."""
    raw = [dg.AssetKey(["raw", BY_NAME[name].key]) for name in resource_types]
    return [*(key for key in raw if graph.has(key)), *select_assets(graph, resource_types)]


def select_backfill(graph: AssetGraph, resource_types: Sequence[str], all_types: Sequence[str]) -> list[dg.AssetKey]:
    """Return the assets that a run of the job ``backfill`` for ``resource_types`` materializes.

    ``all_types`` are those of the deployment. Their deliveries and exports are selected too, because missing references
    may have any of these types.
    """
    selected = [*select_all_layers(graph, resource_types), MISSING_REFERENCES]
    written = (dg.AssetKey([layer, BY_NAME[name].key]) for layer in ("delivered", "exports") for name in all_types)
    return [*selected, *(key for key in written if graph.has(key) and key not in selected)]


def select_own_checks(graph: AssetGraph, assets: Sequence[dg.AssetKey]) -> list[dg.AssetCheckKey]:
    """Return the checks that belong to the steps of ``assets``, without the checks of tables.

    Without a selection of checks, Dagster evaluates all checks of the selected assets.
    """
    selected = set(assets)
    keys = (key for key in graph.asset_check_keys if key.asset_key in selected and key.name not in TABLE_CHECKS)
    return sorted(keys, key=str)


def build_materializations(received: Received) -> Iterator[dg.AssetMaterialization]:
    """Yield materializations of ``raw`` that report a receipt to Dagster, at most MAX_MATERIALIZATIONS."""
    known = [item for item in received.windows if item.resource_type in BY_NAME]
    for item in known[:MAX_MATERIALIZATIONS]:
        yield dg.AssetMaterialization(
            ["raw", BY_NAME[item.resource_type].key],
            partition=item.partition_key,
            description="received, not fetched from the source",
            metadata={"received": item.rows, "dead_letters": item.rejected, "origin": received.origin},
        )
