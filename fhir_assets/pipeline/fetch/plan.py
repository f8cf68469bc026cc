"""Plans a fetch: determines the interval of each window that is not fetched yet."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.storage.manifest import Fetched, Manifest
from fhir_assets.windows import Interval, Window


@dataclass(frozen=True, slots=True)
class PlannedFetch:
    """An interval of one window to fetch. ``base`` is the partition to extend, None if the fetch writes a new one."""

    window: Window
    interval: Interval
    base: Manifest | None


def plan_window(
    window: Window,
    existing: Manifest | None,
    *,
    now: datetime,
    overlap: timedelta,
    refresh: Refresh,
    source_state: str | None,
) -> PlannedFetch | None:
    """Return the interval of ``window`` to fetch now, or None if the window is complete or in the future.

    An extension starts ``overlap`` before the end of the last fetch, because a server may commit a resource late, with
    an earlier ``lastUpdated``. A window with a fetch that may have missed resources is read from its start, so that its
    check passes again once the cause is gone. ``source_state`` is the result of Source.compute_state: a source that has
    one is always read from the start.
    """
    if window.start is not None and window.start >= now:
        return None
    from_start = PlannedFetch(window, Interval(window.start, min(window.end, now)), None)
    fetched = existing.fetched if existing else None
    if fetched is None or refresh is Refresh.FULL or not _has_boundaries(fetched, window):
        return from_start
    if any(fetch.may_be_incomplete for fetch in fetched.fetches):
        return from_start
    if fetched.complete and fetched.source_state == source_state:
        return None if refresh is Refresh.MISSING else from_start
    if source_state is not None or fetched.complete:
        return from_start
    start = fetched.until - overlap
    if window.start is not None:
        start = max(start, window.start)
    return PlannedFetch(window, Interval(start, min(window.end, now)), existing)


def _has_boundaries(fetched: Fetched, window: Window) -> bool:
    """Return whether the fetches belong to a window with these boundaries: a day and a month may have the same key."""
    if fetched.fetches and fetched.fetches[0].start != window.start:
        return False
    return fetched.until == window.end if fetched.complete else fetched.until <= window.end


def is_complete(window: Window, *, now: datetime, overlap: timedelta) -> bool:
    """Return whether a fetch at ``now`` is final: the window, and the overlap for late commits after it, have ended."""
    return now >= window.end + overlap


def split_at_gaps(planned: Iterable[PlannedFetch]) -> Iterator[list[PlannedFetch]]:
    """Group planned fetches into sequences of adjacent intervals, so that each sequence is one query of the source."""
    sequence: list[PlannedFetch] = []
    for item in planned:
        if sequence and sequence[-1].interval.end != item.interval.start:
            yield sequence
            sequence = []
        sequence.append(item)
    if sequence:
        yield sequence


def covering_interval(planned: Iterable[PlannedFetch]) -> Interval:
    """Return the shortest interval that contains the intervals of all planned fetches."""
    intervals = [item.interval for item in planned]
    starts = [interval.start for interval in intervals]
    known = [start for start in starts if start is not None]
    return Interval(min(known) if len(known) == len(starts) else None, max(interval.end for interval in intervals))
