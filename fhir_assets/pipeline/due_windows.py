"""Find the windows that have to be loaded now, and begin the checkpoints of types without one."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import islice

import psycopg

from fhir_assets.fhir.source import Source
from fhir_assets.warehouse.ops import checkpoints
from fhir_assets.windows import Window, WindowRange, WindowScheme


@dataclass(frozen=True, slots=True)
class DueWindows:
    """The windows to load, as one range for each run. Iterating yields the ranges.

    ``new_types`` have no valid checkpoint yet: ``begin_checkpoints`` begins theirs at ``new_start``, for a source in
    the state ``source_state`` (see Source.compute_state).
    """

    ranges: tuple[WindowRange, ...]
    new_types: tuple[str, ...] = ()
    new_start: datetime | None = None
    source_state: str | None = None

    def __iter__(self) -> Iterator[WindowRange]:
        return iter(self.ranges)

    def __len__(self) -> int:
        return len(self.ranges)


def find_due_windows(
    conn: psycopg.Connection,
    source: Source,
    resource_types: Sequence[str],
    scheme: WindowScheme,
    *,
    now: datetime,
    overlap: timedelta,
) -> DueWindows:
    """Return the windows from the checkpoints to ``now``; no ranges if everything is loaded. Write nothing.

    A type without a checkpoint, and every type of a source whose files changed, starts at the window of the oldest
    resource in the source. Other types start ``overlap`` before their checkpoint, for resources that the source
    committed late. Call ``begin_checkpoints`` with the result before the windows are loaded.

    Raises ServerUnavailable, ServerRefused, NotFhir or DatabaseUnavailable.
    """
    offered = source.list_types()
    types = [name for name in resource_types if offered is None or name in offered]
    state = source.compute_state()
    known = checkpoints.get(conn, types)
    new_types = [name for name in types if name not in known or known[name].source_state != state]
    extent = source.find_extent(new_types if state is None else types) if new_types or state is not None else None
    starts = [checkpoint.loaded_until - overlap for name, checkpoint in known.items() if name not in new_types]
    ends = [checkpoint.loaded_until for name, checkpoint in known.items() if name not in new_types]
    new_start = None
    if new_types:
        oldest = extent.start if extent and extent.start else now
        new_start = scheme.window_at(oldest).start or scheme.start
        starts.append(new_start)
        ends.append(new_start)
    nothing_due = DueWindows((), tuple(new_types), new_start, state)
    if not starts:
        return nothing_due
    last = now
    if state is not None:
        if extent is None:
            return nothing_due
        # Resources that are older than all windows belong to the first window.
        end = max(extent.end, scheme.start + timedelta(microseconds=1))
        if min(ends) >= end:
            return nothing_due
        last = min(end, now)
    ranges = split_into_runs(scheme, scheme.between(min(*starts, last), last))
    return replace(nothing_due, ranges=tuple(ranges))


def begin_checkpoints(conn: psycopg.Connection, due: DueWindows) -> None:
    """Write the checkpoints of the types that are loaded for the first time; loads advance them. Does not commit."""
    if due.new_start is not None:
        checkpoints.begin(conn, due.new_types, due.new_start, source_state=due.source_state)


def group_consecutive_windows(scheme: WindowScheme, partition_keys: Iterable[str]) -> list[WindowRange]:
    """Group the windows of partition keys into ranges of consecutive windows, one run each."""
    sequences: list[list[Window]] = []
    for window in sorted((scheme.window(key) for key in set(partition_keys)), key=lambda window: window.end):
        if sequences and sequences[-1][-1].end == window.start:
            sequences[-1].append(window)
        else:
            sequences.append([window])
    return [windows for sequence in sequences for windows in split_into_runs(scheme, sequence)]


def split_into_runs(scheme: WindowScheme, windows: Iterable[Window]) -> list[WindowRange]:
    """Split consecutive windows into ranges of at most ``scheme.per_run`` windows, one run each."""
    remaining = iter(windows)
    return [WindowRange(batch) for batch in iter(lambda: list(islice(remaining, scheme.per_run)), [])]
