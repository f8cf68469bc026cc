"""The windows that other channels than the source received, grouped for runs and reported to Dagster."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import dagster as dg
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

from fhir_assets.catalog import BY_NAME, LOAD_ORDER
from fhir_assets.pipeline.due_windows import group_consecutive_windows
from fhir_assets.pipeline.receive.receiver import Received
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops.received import Pending
from fhir_assets.windows import WindowRange, WindowScheme

MATERIALIZATIONS = 1000
"""How many partitions of one receiving are reported to Dagster at most: each event costs some milliseconds."""


@dataclass(frozen=True, slots=True)
class ReceivedWindows:
    """Consecutive windows for one run, and the types that were received in them."""

    windows: WindowRange
    pending: tuple[Pending, ...]

    @property
    def resource_types(self) -> list[str]:
        """The types, in load order."""
        return sorted({each.resource_type for each in self.pending}, key=LOAD_ORDER.__getitem__)

    @property
    def run_key(self) -> str:
        """The windows, and which attempt at them it is."""
        first, last = self.windows.windows[0].key, self.windows.windows[-1].key
        return f"{first}..{last}/attempt {max(each.asked for each in self.pending) + 1}"


def group(settings: Settings, pending: Sequence[Pending]) -> list[ReceivedWindows]:
    """Windows that follow one another, for one run each. What was received under other settings, of a type or in a
    window that there is none of now, waits until there is again.
    """
    scheme = settings.window_scheme
    by_key: dict[str, list[Pending]] = {}
    for each in pending:
        if each.resource_type in settings.fhir_resource_types and _has(scheme, each.partition_key):
            by_key.setdefault(each.partition_key, []).append(each)
    return [
        ReceivedWindows(part, tuple(each for window in part.windows for each in by_key[window.key]))
        for part in group_consecutive_windows(scheme, by_key)
    ]


def _has(scheme: WindowScheme, key: str) -> bool:
    try:
        window = scheme.window(key)
    except ValueError:
        return False
    return scheme.window_at(window.end - timedelta(microseconds=1)) == window


def assets_of(graph: AssetGraph, resource_types: Sequence[str]) -> list[dg.AssetKey]:
    """The assets of ``load_received`` for some types: validated, all tables that are made of it, and delivered."""
    found = []
    for name in resource_types:
        validated = dg.AssetKey(["validated", BY_NAME[name].key])
        if graph.has(validated):
            made = sorted(k for k in graph.get(validated).child_keys if k.path[0] in ("normalized", "delivered"))
            found += [validated, *made]
    return found


def materializations(brought: Received) -> Iterator[dg.AssetMaterialization]:
    """What was received, as Dagster sees it: materializations of partitions of raw, the first MATERIALIZATIONS."""
    for item in [each for each in brought.items if each.resource_type in BY_NAME][:MATERIALIZATIONS]:
        yield dg.AssetMaterialization(
            ["raw", BY_NAME[item.resource_type].key],
            partition=item.partition_key,
            description="received by another door than the source",
            metadata={"received": item.rows, "dead_letters": item.rejected, "origin": brought.origin},
        )
