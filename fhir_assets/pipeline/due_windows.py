"""Which windows have to be loaded now."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from itertools import islice

import psycopg

from fhir_assets.fhir.source import Source
from fhir_assets.warehouse.ops import checkpoints
from fhir_assets.windows import Window, WindowRange, WindowScheme


def find_due_windows(
    conn: psycopg.Connection,
    source: Source,
    resource_types: Sequence[str],
    scheme: WindowScheme,
    *,
    now: datetime,
    overlap: timedelta,
) -> list[WindowRange]:
    """Every window from the checkpoints to now, in ranges for one run each; empty if all is loaded.

    A type without a checkpoint, and every type of a source whose files changed, begins at the oldest resource
    that the source holds; so no window is asked for that cannot have anything in it.
    """
    offered = source.offered()
    types = [name for name in resource_types if offered is None or name in offered]
    state = source.state()
    known = checkpoints.get(conn, types)
    begin = [name for name in types if name not in known or known[name].source_state != state]
    extent = source.extent(begin if state is None else types) if begin or state is not None else None
    if begin:
        start = extent.start if extent and extent.start else now
        checkpoints.begin(conn, begin, scheme.window_at(start).start or scheme.start, source_state=state)
        known = checkpoints.get(conn, types)
    if not known:
        return []
    last = now
    if state is not None:
        if extent is None:
            return []
        # What is older than all windows belongs into the first.
        end = max(extent.end, scheme.start + timedelta(microseconds=1))
        if min(checkpoint.loaded_until for checkpoint in known.values()) >= end:
            return []
        last = min(end, now)
    # A checkpoint that has only begun has nothing before it that could come late.
    first = min(each.loaded_until - (timedelta(0) if name in begin else overlap) for name, each in known.items())
    return split_into_runs(scheme, scheme.between(min(first, last), last))


def group_consecutive_windows(scheme: WindowScheme, partition_keys: Iterable[str]) -> list[WindowRange]:
    """The windows of some partition keys in ranges that follow one another, for one run each."""
    stretches: list[list[Window]] = []
    for window in sorted((scheme.window(key) for key in set(partition_keys)), key=lambda window: window.end):
        if stretches and stretches[-1][-1].end == window.start:
            stretches[-1].append(window)
        else:
            stretches.append([window])
    return [part for stretch in stretches for part in split_into_runs(scheme, stretch)]


def split_into_runs(scheme: WindowScheme, windows: Iterable[Window]) -> list[WindowRange]:
    """Windows in ranges for one run each."""
    rest = iter(windows)
    return [WindowRange(part) for part in iter(lambda: list(islice(rest, scheme.per_run)), [])]
