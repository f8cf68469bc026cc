"""FHIR dates as ranges of microseconds, and the comparison prefixes of a search.

See https://hl7.org/fhir/R4/search.html#date.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_DATE = re.compile(
    r"(?P<year>\d{4})(?:-(?P<month>\d\d)(?:-(?P<day>\d\d)"
    r"(?:T(?P<hour>\d\d):(?P<minute>\d\d)(?::(?P<second>\d\d)(?:\.(?P<fraction>\d{1,9}))?)?"
    r"(?P<zone>Z|[+-]\d\d:\d\d)?)?)?)?"
)
_PREFIXED = re.compile(r"(?P<prefix>eq|ne|gt|lt|ge|le|sa|eb)?(?P<date>\d.*)")
FAR_FUTURE = 2**62


def to_microseconds(moment: datetime) -> int:
    """Return the microseconds since 1970 of an aware datetime."""
    return (moment - _EPOCH) // _MICROSECOND


def instant(when: int) -> str:
    """Return microseconds since 1970 as a FHIR instant in UTC, with milliseconds."""
    return (_EPOCH + timedelta(microseconds=when)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def from_microseconds(when: int) -> datetime:
    """Return microseconds since 1970 as an aware datetime."""
    return _EPOCH + timedelta(microseconds=when)


@dataclass(frozen=True, slots=True)
class TimeRange:
    """A half-open range of microseconds since 1970: the period that a FHIR date of any precision covers."""

    start: int
    end: int


def parse_date(text: str) -> TimeRange:
    """Parse a FHIR date, dateTime or instant of any precision, in UTC if it has no zone. Raises ValueError."""
    match = _DATE.fullmatch(text)
    if match is None:
        raise ValueError("not a FHIR date")
    part = match.groupdict()
    year, month, day = int(part["year"]), int(part["month"] or 1), int(part["day"] or 1)
    zone = part["zone"] if part["zone"] not in (None, "Z") else "+00:00"
    start = to_microseconds(
        datetime.fromisoformat(
            f"{year:04}-{month:02}-{day:02}T{part['hour'] or '00'}:{part['minute'] or '00'}"
            f":{part['second'] or '00'}{zone}"
        )
    )
    if part["month"] is None:
        return TimeRange(start, to_microseconds(datetime(year + 1, 1, 1, tzinfo=UTC)))
    if part["day"] is None:
        return TimeRange(start, to_microseconds(datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC)))
    if part["hour"] is None:
        return TimeRange(start, start + 86_400_000_000)
    if part["second"] is None:
        return TimeRange(start, start + 60_000_000)
    fraction = part["fraction"]
    if fraction is None:
        return TimeRange(start, start + 1_000_000)
    start += int(fraction[:6].ljust(6, "0"))
    return TimeRange(start, start + 10 ** (6 - min(len(fraction), 6)))


def compare(text: str) -> TimeRange:
    """Return the range of instants that a search value such as ``ge2024-01`` matches. Raises ValueError.

    ``ne`` is not supported, because it does not match a single range.
    """
    match = _PREFIXED.fullmatch(text)
    if match is None or match["prefix"] == "ne":
        raise ValueError("not a FHIR date with a prefix of eq, gt, ge, lt, le, sa or eb")
    date = parse_date(match["date"])
    match match["prefix"]:
        case "ge":
            return TimeRange(date.start, FAR_FUTURE)
        case "gt" | "sa":
            return TimeRange(date.end, FAR_FUTURE)
        case "lt" | "eb":
            return TimeRange(-FAR_FUTURE, date.start)
        case "le":
            return TimeRange(-FAR_FUTURE, date.end)
        case _:
            return date
