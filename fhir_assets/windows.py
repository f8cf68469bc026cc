"""Windows of ``meta.lastUpdated``: half-open intervals in UTC, with the keys of Dagster's time-window partitions."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

EARLIEST = datetime.min.replace(tzinfo=UTC)
"""The first moment of the years 1 to 9999, the range of times in FHIR."""

LATEST = datetime.max.replace(tzinfo=UTC)
"""The last moment of the years 1 to 9999."""


def add_clamped(moment: datetime, delta: timedelta) -> datetime:
    """Return ``moment + delta``, or EARLIEST or LATEST if the sum is outside of the years 1 to 9999."""
    try:
        return moment + delta
    except OverflowError:
        return LATEST if delta > timedelta() else EARLIEST


class Granularity(StrEnum):
    """The length of a window."""

    HOURLY = "hourly"
    DAILY = "daily"
    MONTHLY = "monthly"

    @property
    def key_format(self) -> str:
        """The strftime format of partition keys, the same as in Dagster's hourly, daily and monthly partitions."""
        return "%Y-%m-%d-%H:%M" if self is Granularity.HOURLY else "%Y-%m-%d"

    def floor(self, moment: datetime) -> datetime:
        """Return the start of the window that contains ``moment``."""
        moment = moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        if self is Granularity.HOURLY:
            return moment
        moment = moment.replace(hour=0)
        return moment if self is Granularity.DAILY else moment.replace(day=1)

    def next(self, start: datetime) -> datetime:
        """Return the start of the window after the one that starts at ``start``."""
        if self is Granularity.HOURLY:
            return add_clamped(start, timedelta(hours=1))
        if self is Granularity.DAILY:
            return add_clamped(start, timedelta(days=1))
        following = add_clamped(start.replace(day=1), timedelta(days=32))
        return following if following == LATEST else following.replace(day=1)


@dataclass(frozen=True, slots=True)
class Interval:
    """A half-open interval of time in UTC. Without ``start`` it has no lower bound."""

    start: datetime | None
    end: datetime

    def __contains__(self, moment: datetime) -> bool:
        return (self.start is None or self.start <= moment) and moment < self.end


def merge_intervals(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the intervals, with touching and overlapping ones merged. ``intervals`` must be sorted by start."""
    merged: list[Interval] = []
    for interval in intervals:
        if merged and (interval.start is None or interval.start <= merged[-1].end):
            merged[-1] = Interval(merged[-1].start, max(merged[-1].end, interval.end))
        else:
            merged.append(interval)
    return merged


@dataclass(frozen=True, slots=True)
class Window(Interval):
    """The window of one partition: its key and its interval."""

    key: str


@dataclass(frozen=True, slots=True)
class WindowScheme:
    """The consecutive windows of a deployment, from ``start`` on.

    With ``open_start`` the first window has no lower bound, so that it contains all older resources. A run loads at
    most ``per_run`` windows.
    """

    granularity: Granularity
    start: datetime
    open_start: bool
    per_run: int = 100

    def window_at(self, moment: datetime) -> Window:
        """Return the window that contains ``moment``, or the first window for an older moment."""
        start = max(self.granularity.floor(moment), self.start)
        return self._window(start)

    def window(self, key: str) -> Window:
        """Return the window of a partition key. Raises ValueError if the key is malformed."""
        start = datetime.strptime(key, self.granularity.key_format).replace(tzinfo=UTC)
        return self._window(start)

    def before(self, window: Window) -> Window:
        """Return the window before ``window``, which must not be the first."""
        assert window.start is not None
        return self._window(self.granularity.floor(window.start - timedelta(microseconds=1)))

    def between(self, first: datetime, last: datetime) -> Iterator[Window]:
        """Yield the windows from the one that contains ``first`` to the one that contains ``last``."""
        window = self.window_at(first)
        yield window
        while window.end <= last:
            window = self._window(window.end)
            yield window

    def _window(self, start: datetime) -> Window:
        unbounded = self.open_start and start <= self.start
        return Window(
            None if unbounded else start,
            self.granularity.next(start),
            start.strftime(self.granularity.key_format),
        )


class WindowRange:
    """One or more consecutive windows that are processed in one pass."""

    def __init__(self, windows: list[Window], *, from_first: bool = False) -> None:
        """Set ``from_first`` if the range begins with the first window of the scheme."""
        self.windows = windows
        self.from_first = from_first
        self.interval = Interval(windows[0].start, windows[-1].end)
        self._ends = [window.end for window in windows]

    def find(self, moment: datetime) -> Window | None:
        """Return the window that contains ``moment``, or None if it is outside of the range."""
        if moment not in self.interval:
            return None
        return self.windows[bisect_right(self._ends, moment)]

    def nearest(self, moment: datetime) -> Window:
        """Return the window that contains ``moment``, or the window at the nearer end of the range."""
        return self.windows[min(bisect_right(self._ends, moment), len(self.windows) - 1)]
