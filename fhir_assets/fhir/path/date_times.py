"""Comparison and boundaries of dates, times and decimals with a limited precision (FHIRPath sections 5.6, 6.1, 6.2).

A date or dateTime of limited precision is an interval of UTC: ``2024-05`` is the whole month. Two of them are equal if
their intervals are equal, ordered if their intervals do not overlap, and incomparable (None) otherwise. If only one of
them has a time zone, the interval of the other is widened to all time zones.
"""

import calendar
import re
from datetime import date, datetime, timedelta
from decimal import Decimal

from fhir_assets.errors import FhirPathError
from fhir_assets.fhir.path.equality import Number, exact

_DATE_TIME = re.compile(
    r"(?P<year>\d{4})(?:-(?P<month>\d\d)(?:-(?P<day>\d\d))?)?"
    r"(?:T(?:(?P<hour>\d\d)(?::(?P<minute>\d\d)(?::(?P<second>\d\d)(?:\.(?P<fraction>\d+))?)?)?)?)?"
    r"(?P<zone>Z|[+-]\d\d:\d\d)?"
)
_TIME = re.compile(r"(\d\d)(?::(\d\d)(?::(\d\d)(?:\.(\d+))?)?)?")
_EARLIEST, _LATEST = timedelta(hours=14), timedelta(hours=12)


def _interval(text: str) -> tuple[datetime, datetime, bool]:
    """Return the start of the interval, its end (exclusive), and whether the text has a time zone.

    Start and end are in UTC if the text has a time zone, otherwise as written.
    """
    match = _DATE_TIME.fullmatch(text)
    if match is None:
        raise FhirPathError("a date or time does not have the format that FHIR prescribes")
    part = match.groupdict()
    year, month, day = int(part["year"]), int(part["month"] or 1), int(part["day"] or 1)
    try:
        fraction = (part["fraction"] or "0")[:6].ljust(6, "0")
        start = datetime(
            year, month, day, int(part["hour"] or 0), int(part["minute"] or 0), int(part["second"] or 0), int(fraction)
        )
        if part["second"]:
            end = start
        elif part["minute"]:
            end = start + timedelta(minutes=1)
        elif part["hour"]:
            end = start + timedelta(hours=1)
        elif part["day"]:
            end = start + timedelta(days=1)
        elif part["month"]:
            end = start + timedelta(days=calendar.monthrange(year, month)[1])
        else:
            end = datetime(year + 1, 1, 1)
        zone = part["zone"]
        if zone and zone != "Z":
            offset = timedelta(hours=int(zone[1:3]), minutes=int(zone[4:6])) * (-1 if zone[0] == "-" else 1)
            start, end = start - offset, end - offset
    except (ValueError, OverflowError):
        raise FhirPathError("a date or time does not exist in the calendar") from None
    return start, end, zone is not None


def compare(left: object, right: object) -> int | None:
    """Return -1, 0 or 1 for two dates, dateTimes or instants; None if they are incomparable.

    Raises FhirPathError if a value is not a date or dateTime.
    """
    if left == right:
        return 0
    if not isinstance(left, str) or not isinstance(right, str):
        raise FhirPathError("values of different types have no order: compare values of one type")
    if len(left) == len(right) == 10:
        return -1 if left < right else 1
    start, end, zoned = _interval(left)
    start2, end2, zoned2 = _interval(right)
    if zoned != zoned2:
        try:
            if zoned:
                start2, end2 = start2 - _EARLIEST, end2 + _LATEST
            else:
                start, end = start - _EARLIEST, end + _LATEST
        except OverflowError:
            return None
    if (start, end) == (start2, end2) and zoned == zoned2:
        return 0
    if end <= start2:
        return -1
    return 1 if end2 <= start else None


def equal(left: object, right: object) -> bool | None:
    """Return True if two dates, dateTimes or instants are equal; None if they are incomparable."""
    if left == right:
        return True
    if not isinstance(left, str) or not isinstance(right, str):
        return False
    sign = compare(left, right)
    return None if sign is None else sign == 0


def _date_time_boundary(text: str, high: bool, *, time: bool) -> str | None:
    match = _DATE_TIME.fullmatch(text)
    if match is None:
        return None
    part = match.groupdict()
    year, month = int(part["year"]), int(part["month"] or (12 if high else 1))
    day = part["day"] or (f"{calendar.monthrange(year, month)[1]:02}" if high else "01")
    day_text = f"{year:04}-{month:02}-{day}"
    if not time:
        return day_text
    clock = _clock_boundary(part["hour"], part["minute"], part["second"], part["fraction"], high)
    return f"{day_text}T{clock}{part['zone'] or ('-12:00' if high else '+14:00')}"


def _clock_boundary(hour: str | None, minute: str | None, second: str | None, fraction: str | None, high: bool) -> str:
    fill = "9" if high else "0"
    return (
        f"{hour or ('23' if high else '00')}:{minute or ('59' if high else '00')}:{second or ('59' if high else '00')}"
        f".{(fraction or '').ljust(3, fill)}"
    )


def date_boundary(text: str, high: bool) -> str | None:
    """Return the first (last, if ``high``) day of a partial date; None if the text is not a date."""
    return _date_time_boundary(text, high, time=False)


def date_time_boundary(text: str, high: bool) -> str | None:
    """Return the first (last, if ``high``) millisecond of a partial dateTime; None if the text is not a dateTime.

    Without a time zone, it is the first or last millisecond in any time zone.
    """
    return _date_time_boundary(text, high, time=True)


def time_boundary(text: str, high: bool) -> str | None:
    """Return the first (last, if ``high``) millisecond of a partial time; None if the text is not a time."""
    match = _TIME.fullmatch(text)
    return None if match is None else _clock_boundary(match[1], match[2], match[3], match[4], high)


def decimal_boundary(value: Number, high: bool) -> Decimal:
    """Return the number minus (plus, if ``high``) half a unit of its last digit."""
    number = exact(value)
    half = Decimal((0, (5,), min(int(number.as_tuple().exponent), 0) - 1))
    return number + half if high else number - half


def boundary(value: object, high: bool) -> object:
    """Return the boundary of a value of unknown FHIR type, which is inferred from the value.

    Raises FhirPathError if the value is neither a number nor a string.
    """
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return decimal_boundary(value, high)
    if isinstance(value, str):
        if _TIME.fullmatch(value) and ":" in value:
            return time_boundary(value, high)
        return (date_time_boundary if "T" in value else date_boundary)(value, high)
    raise FhirPathError("lowBoundary() and highBoundary() take a number, a date or a time")


def is_date(text: str) -> bool:
    """Return True if the text is a FHIR date that exists in the calendar."""
    try:
        match = _DATE_TIME.fullmatch(text)
        if match is None or "T" in text or match["zone"]:
            return False
        date(int(match["year"]), int(match["month"] or 1), int(match["day"] or 1))
    except ValueError:
        return False
    return True


def is_date_time(text: str) -> bool:
    """Return True if the text is a FHIR dateTime, complete or partial, that exists in the calendar."""
    try:
        _interval(text)
    except FhirPathError:
        return False
    return True


def is_time(text: str) -> bool:
    """Return True if the text is a time of day."""
    match = _TIME.fullmatch(text)
    return match is not None and int(match[1]) < 24 and int(match[2] or 0) < 60 and int(match[3] or 0) < 60
