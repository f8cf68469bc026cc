"""Formats times since 1970 as FHIR dates by means of tables, because generators spend much of their time on dates."""

from datetime import date

_EPOCH = date(1970, 1, 1).toordinal()
DAY = 86_400
_ZONE = 5 * 3600


class _Days(dict[int, str]):
    def __missing__(self, day: int) -> str:
        text = self[day] = date.fromordinal(_EPOCH + day).isoformat()
        return text


DAYS = _Days()
"""``YYYY-MM-DD`` by the number of days since 1970."""
_MINUTES = tuple(f"{minute // 60:02}:{minute % 60:02}:" for minute in range(1440))
_SECONDS = tuple(f"{second:02}" for second in range(60))


def instant(milliseconds: int) -> str:
    """Return a FHIR instant in UTC."""
    seconds, rest = divmod(milliseconds, 1000)
    day, second = divmod(seconds, DAY)
    return f"{DAYS[day]}T{_MINUTES[second // 60]}{_SECONDS[second % 60]}.{rest:03}Z"


def date_time(seconds: int) -> str:
    """Return a FHIR dateTime with the offset of US Eastern Standard Time."""
    day, second = divmod(seconds - _ZONE, DAY)
    return f"{DAYS[day]}T{_MINUTES[second // 60]}{_SECONDS[second % 60]}-05:00"


def day_of(seconds: int) -> str:
    """Return a FHIR date."""
    return DAYS[(seconds - _ZONE) // DAY]
