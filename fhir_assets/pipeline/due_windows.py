"""Finds the windows that have to be loaded now, and begins the checkpoints of new resource types."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import islice

import psycopg

from fhir_assets.errors import ServerRefused
from fhir_assets.fhir.source import Source
from fhir_assets.notices import log_notices
from fhir_assets.pipeline.type_failures import TypeFailures
from fhir_assets.warehouse.ops import checkpoints
from fhir_assets.windows import Interval, Window, WindowRange, WindowScheme


@dataclass(frozen=True, slots=True)
class DueWindows:
    """The windows to load, as one range for each run. Iterating yields the ranges.

    ``new_types`` have no valid checkpoint yet. ``begin_checkpoints`` writes their checkpoints, at ``new_start``, for a
    source in the state ``source_state`` (see Source.compute_state). If the request for the oldest resource of a new
    type fails, the type is left out of ``new_types``: the step that loads the type fails, and the next call repeats
    the request.
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
    """Return the windows from the checkpoints to ``now``; no ranges if everything is loaded.

    A type without a checkpoint, and every type of a source whose files changed, starts at the window of the oldest
    resource in the source, or at the first window if the source does not know which resource is the oldest. Other types
    start ``overlap`` before their checkpoint, for resources that the source committed late. This function does not
    write to the database: call ``begin_checkpoints`` with the result before the windows are loaded.

    ``now`` is replaced by the time of the source's clock if that is earlier.

    Raises ServerUnavailable, ServerRefused or NotFhir if the requests for all types failed, and DatabaseUnavailable.
    """
    offered = source.list_types()
    types = [name for name in resource_types if offered is None or name in offered]
    state = source.compute_state()
    known = checkpoints.get(conn, types)
    new_types = [name for name in types if name not in known or known[name].source_state != state]
    failures = TypeFailures()
    extent = find_extent(source, new_types if state is None else types, failures)
    now = min(now, source.read_clock() or now)
    log_notices(source.drain_notices())
    new_types = [name for name in new_types if name not in failures]
    if failures and len(failures) == len(types):
        failures.raise_collected()
    starts = [checkpoint.loaded_until - overlap for name, checkpoint in known.items() if name not in new_types]
    ends = [checkpoint.loaded_until for name, checkpoint in known.items() if name not in new_types]
    new_start = None
    if new_types:
        oldest = now if extent is None else extent.start or scheme.start
        new_start = scheme.window_at(oldest).start or scheme.start
        starts.append(new_start)
        ends.append(new_start)
    if failures:
        # At least the current window is due, so that there is a run whose steps report the failures.
        starts.append(now)
    without_ranges = DueWindows((), tuple(new_types), new_start, state)
    if not starts:
        return without_ranges
    last = now
    if state is not None:
        if extent is None:
            return without_ranges
        # Resources that are older than all windows belong to the first window.
        end = max(extent.end, scheme.start + timedelta(microseconds=1))
        if min(ends) >= end:
            return without_ranges
        last = min(end, now)
    ranges = split_into_runs(scheme, scheme.between(min(*starts, last), last))
    return replace(without_ranges, ranges=tuple(ranges))


def find_extent(source: Source, resource_types: Sequence[str], failures: TypeFailures) -> Interval | None:
    """Return the interval from the oldest resource of the types to the newest; None if the source has none of them.

    A source that is not ``one_pass`` receives a request for each type; failed requests are added to ``failures``. The
    interval has no start if the source does not know the oldest resource of one of the types.
    """
    if not resource_types:
        return None
    if source.one_pass:
        try:
            extent = source.find_extent(resource_types)
        except ServerRefused as error:
            failures.errors.update(dict.fromkeys(resource_types, error))
            return None
        failures.errors.update(source.refused)
        return extent
    extents = []
    for name in resource_types:
        with failures.collect(name):
            extents.append(source.find_extent([name]))
    known = [extent for extent in extents if extent is not None]
    if not known:
        return None
    starts = [extent.start for extent in known if extent.start is not None]
    return Interval(min(starts) if len(starts) == len(known) else None, max(extent.end for extent in known))


def begin_checkpoints(conn: psycopg.Connection, due: DueWindows) -> None:
    """Write the first checkpoints of new types. Loads advance them later. Does not commit."""
    if due.new_start is not None:
        checkpoints.begin(conn, due.new_types, due.new_start, source_state=due.source_state)


def group_consecutive_windows(scheme: WindowScheme, partition_keys: Iterable[str]) -> list[WindowRange]:
    """Group the windows of partition keys into ranges of consecutive windows. Each range is loaded by one run."""
    sequences: list[list[Window]] = []
    for window in sorted((scheme.window(key) for key in set(partition_keys)), key=lambda window: window.end):
        if sequences and sequences[-1][-1].end == window.start:
            sequences[-1].append(window)
        else:
            sequences.append([window])
    return [windows for sequence in sequences for windows in split_into_runs(scheme, sequence)]


def split_into_runs(scheme: WindowScheme, windows: Iterable[Window]) -> list[WindowRange]:
    """Split consecutive windows into ranges of at most ``scheme.per_run`` windows. Each range is loaded by one run."""
    remaining = iter(windows)
    return [WindowRange(batch) for batch in iter(lambda: list(islice(remaining, scheme.per_run)), [])]
