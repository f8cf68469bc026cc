"""What of a window still has to be fetched."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.storage.manifest import Manifest
from fhir_assets.windows import Interval, Window


@dataclass(frozen=True, slots=True)
class Planned:
    """A stretch of one window to fetch. ``base`` is the partition that it extends, None for a new one."""

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
) -> Planned | None:
    """What to fetch of ``window`` now; None if nothing. An extension begins ``overlap`` before the checkpoint,
    for resources that were committed late under an earlier ``lastUpdated``.
    """
    if window.start is not None and window.start >= now:
        return None
    anew = Planned(window, Interval(window.start, min(window.end, now)), None)
    fetched = existing.fetched if existing else None
    if fetched is None or refresh is Refresh.FULL:
        return anew
    if fetched.complete and fetched.source_state == source_state:
        return None if refresh is Refresh.MISSING else anew
    if source_state is not None or fetched.complete:
        return anew
    start = fetched.until - overlap
    if window.start is not None:
        start = max(start, window.start)
    return Planned(window, Interval(start, min(window.end, now)), existing)


def is_complete(window: Window, *, now: datetime, overlap: timedelta) -> bool:
    """Whether a window fetched at ``now`` can receive nothing more: it ended, and the late commits are in."""
    return now >= window.end + overlap


def split_at_gaps(planned: Iterable[Planned]) -> Iterator[list[Planned]]:
    """Planned windows in runs without a gap, so that each run is one request to the source."""
    run: list[Planned] = []
    for item in planned:
        if run and run[-1].interval.end != item.interval.start:
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def covering_interval(planned: Iterable[Planned]) -> Interval:
    """The shortest interval that covers all the planned ones."""
    intervals = [item.interval for item in planned]
    starts = [interval.start for interval in intervals]
    known = [start for start in starts if start is not None]
    return Interval(min(known) if len(known) == len(starts) else None, max(interval.end for interval in intervals))
