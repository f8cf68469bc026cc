"""The clock of a FHIR server, derived from the Date headers of its responses.

See https://www.rfc-editor.org/rfc/rfc9110#field.date.
"""

import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import lru_cache

from fhir_assets.notices import Notices, Severity
from fhir_assets.windows import add_clamped

MAX_SKEW = timedelta(minutes=1)
"""If the server's clock differs from this machine's by more than this, a notice is added."""
_MISLEADING_SKEW = timedelta(days=7)
"""If the clocks differ by more than this, one of them is wrong, and windows are not loaded at the right time."""
DATE_PRECISION = timedelta(seconds=3)
"""The maximum delay of a Date header, which has whole seconds and is updated about once a second (uvicorn, nginx)."""
_MAX_AGE_DIGITS = 10
"""The number of digits of an Age header that are read. Further digits are ignored."""
_HTTP_DATE = re.compile(r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT")


class ServerClock:
    """The time of a server between its responses: the last Date header, and the time that has passed since.

    ``now`` is the clock of this machine. A difference of more than a minute is added to ``notices``.
    """

    def __init__(
        self,
        notices: Notices,
        server: str,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._notices = notices
        self._server = server
        self._now = now
        self._monotonic = monotonic
        self._observed: tuple[datetime, float] | None = None
        self._has_warned = False

    def observe(self, headers: Mapping[str, str], seconds: float) -> None:
        """Record the time in the headers of a response that arrived ``seconds`` after its request was sent.

        The time that a cache has kept the response (its Age header) is added to its Date.
        """
        date = read_date(headers)
        if date is None:
            return
        date = add_clamped(date, timedelta(seconds=read_age(headers)))
        self._observed = date, self._monotonic()
        if self._has_warned:
            return
        now = self._now()
        if now - timedelta(seconds=seconds) - date > MAX_SKEW:
            self._add_notice(now - date, "ahead of", "windows are loaded up to the server's time")
        elif date - now > MAX_SKEW:
            self._add_notice(date - now, "behind", "resources are loaded when this machine's clock reaches their time")

    def read(self) -> datetime | None:
        """Return the latest time that the server's clock may show. The clock is at most DATE_PRECISION behind it.

        None if no response had a valid Date header.
        """
        if self._observed is None:
            return None
        date, at = self._observed
        return add_clamped(date, DATE_PRECISION + timedelta(seconds=self._monotonic() - at))

    def _add_notice(self, skew: timedelta, direction: str, effect: str) -> None:
        self._has_warned = True
        severity: Severity = "error" if skew > _MISLEADING_SKEW else "warning"
        self._notices.add(
            severity,
            "clock-skew",
            f"the clock of this machine is {format_duration(skew)} {direction} that of {self._server} (its Date "
            f"header): {effect}; synchronize the clocks of both machines (NTP)",
        )


def read_date(headers: Mapping[str, str]) -> datetime | None:
    """Return the time of the Date header in UTC, the earliest if it occurs several times; None without a valid one."""
    return _parse_date(headers.get("Date", ""))


@lru_cache(maxsize=16)
def _parse_date(text: str) -> datetime | None:
    dates = _HTTP_DATE.findall(text) or [text]
    try:
        moments = [parsedate_to_datetime(date) for date in dates]
        return min(moment if moment.tzinfo else moment.replace(tzinfo=UTC) for moment in moments).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def read_age(headers: Mapping[str, str]) -> int:
    """Return the seconds that a cache has kept a response (its Age header); 0 if it comes from the server itself."""
    text = headers.get("Age", "").partition(",")[0].strip()
    return int(text[:_MAX_AGE_DIGITS]) if text.isascii() and text.isdigit() else 0


def format_duration(duration: timedelta) -> str:
    """Return a duration in its largest whole unit, such as ``26 hours``."""
    seconds = round(abs(duration) / timedelta(seconds=1))
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}s"
    return f"{seconds} seconds"
