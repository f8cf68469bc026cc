"""Windows of ``meta.lastUpdated``: half-open intervals in UTC, named as Dagster names the partitions."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum


class Granularity(StrEnum):
    """The length of a window."""

    HOURLY = "hourly"
    DAILY = "daily"
    MONTHLY = "monthly"

    @property
    def key_format(self) -> str:
        """The partition key of a window, as Dagster's hourly, daily and monthly partitions write it."""
        return "%Y-%m-%d-%H:%M" if self is Granularity.HOURLY else "%Y-%m-%d"

    def floor(self, moment: datetime) -> datetime:
        """The start of the window that holds ``moment``."""
        moment = moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        if self is Granularity.HOURLY:
            return moment
        moment = moment.replace(hour=0)
        return moment if self is Granularity.DAILY else moment.replace(day=1)

    def next(self, start: datetime) -> datetime:
        """The start of the window after the one that starts at ``start``."""
        if self is Granularity.HOURLY:
            return start + timedelta(hours=1)
        if self is Granularity.DAILY:
            return start + timedelta(days=1)
        return (start.replace(day=1) + timedelta(days=32)).replace(day=1)


@dataclass(frozen=True, slots=True)
class Interval:
    """A half-open stretch of time, UTC. ``start`` is None where nothing bounds it below."""

    start: datetime | None
    end: datetime

    def __contains__(self, moment: datetime) -> bool:
        return (self.start is None or self.start <= moment) and moment < self.end


def joined(intervals: Iterable[Interval]) -> list[Interval]:
    """Intervals in the order of their starts, those as one that follow one another without a gap."""
    spans: list[Interval] = []
    for each in intervals:
        if spans and (each.start is None or each.start <= spans[-1].end):
            spans[-1] = Interval(spans[-1].start, max(spans[-1].end, each.end))
        else:
            spans.append(each)
    return spans


@dataclass(frozen=True, slots=True)
class Window(Interval):
    """One partition: its key and its interval."""

    key: str


@dataclass(frozen=True, slots=True)
class WindowScheme:
    """All windows there are: consecutive, from ``start`` on. With ``open_start`` the first window also takes all
    that is older, so that a server's history is never cut off unseen. One run takes ``per_run`` of them at most.
    """

    granularity: Granularity
    start: datetime
    open_start: bool
    per_run: int = 100

    def window_at(self, moment: datetime) -> Window:
        """The window that holds ``moment``; the first one for anything older."""
        start = max(self.granularity.floor(moment), self.start)
        return self._window(start)

    def window(self, key: str) -> Window:
        """The window of a partition key. Raises ValueError if the key is not one."""
        start = datetime.strptime(key, self.granularity.key_format).replace(tzinfo=UTC)
        return self._window(start)

    def before(self, window: Window) -> Window:
        """The window before one that is not the first."""
        assert window.start is not None
        return self._window(self.granularity.floor(window.start - timedelta(microseconds=1)))

    def between(self, first: datetime, last: datetime) -> Iterator[Window]:
        """Every window from the one that holds ``first`` to the one that holds ``last``."""
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
    """Consecutive windows that are worked on together, in one pass. Never empty."""

    def __init__(self, windows: list[Window], *, from_first: bool = False) -> None:
        """``from_first``: the range begins with the first window there is."""
        self.windows = windows
        self.from_first = from_first
        self.interval = Interval(windows[0].start, windows[-1].end)
        self._ends = [window.end for window in windows]

    def place(self, moment: datetime) -> Window | None:
        """The window that holds ``moment``, None if it lies outside of the range."""
        if moment not in self.interval:
            return None
        return self.windows[bisect_right(self._ends, moment)]

    def nearest(self, moment: datetime) -> Window:
        """The window that holds ``moment``, or else the nearer end of the range."""
        return self.windows[min(bisect_right(self._ends, moment), len(self.windows) - 1)]
