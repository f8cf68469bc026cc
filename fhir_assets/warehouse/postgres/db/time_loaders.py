"""Loaders for times that Postgres stores but that cannot be represented as a ``datetime`` in UTC.

FHIR's times are of the years 1 to 9999 in any zone. Some of them are in the year 10000 or in the year before year 1 in
UTC, for which ``datetime`` has no value; a ``datetime`` in a zone with an offset of fourteen hours can represent them.
The time of day 24:00:00, as which Postgres stores the leap second 23:59:60, is loaded as text.
"""

import re
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from typing import Any

import psycopg
from psycopg.abc import AdaptContext, Buffer
from psycopg.adapt import AdaptersMap, Loader
from psycopg.pq import Format

_OUTSIDE = re.compile(r"(10000-01-01|0001-12-31) (\d\d):(\d\d):(\d\d)(?:\.(\d{1,6}))?\+00( BC)?").fullmatch
_LAST_DAY = datetime(9999, 12, 31)
_FIRST_DAY = datetime(1, 1, 1)
_OFFSETS = (timedelta(hours=14), timedelta(hours=15, minutes=59))
"""The largest offset of FHIR (https://hl7.org/fhir/R4/datatypes.html#instant), and that of Postgres."""


def parse_outside_of_utc(text: str) -> datetime | None:
    """Return a time of 10000-01-01 or of 0001-12-31 BC, as Postgres writes it in UTC, in a zone that can represent it.

    Return None for any other text.
    """
    match = _OUTSIDE(text)
    if match is None or (match[1] == "10000-01-01") == bool(match[6]):
        return None
    hours, minutes, seconds = map(int, match.group(2, 3, 4))
    microseconds = int((match[5] or "").ljust(6, "0"))
    of_day = timedelta(hours=hours, minutes=minutes, seconds=seconds, microseconds=microseconds)
    day = timedelta(days=1)
    for offset in _OFFSETS:
        if match[6] and of_day + offset >= day:
            return (_FIRST_DAY + (of_day + offset - day)).replace(tzinfo=timezone(offset))
        if not match[6] and of_day < offset:
            return (_LAST_DAY + (of_day - offset + day)).replace(tzinfo=timezone(-offset))
    return None


class _WrappingLoader(Loader):
    """A loader that delegates to psycopg's own loader, which cannot be subclassed."""

    def __init__(self, oid: int, context: AdaptContext | None = None) -> None:
        super().__init__(oid, context)
        self._load = psycopg.adapters.get_loader(oid, Format.TEXT)(oid, context).load  # type: ignore[misc]


class _AnyTimestamptzLoader(_WrappingLoader):
    def load(self, data: Buffer) -> Any:
        """Return a time as ``datetime``: in UTC, or in a zone that can represent it."""
        try:
            return self._load(data)
        except psycopg.DataError:
            moment = parse_outside_of_utc(bytes(data).decode())
            if moment is None:
                raise
            return moment


class _AnyTimeLoader(_WrappingLoader):
    def load(self, data: Buffer) -> Any:
        """Return a time of day, or the text ``24:00:00``."""
        try:
            return self._load(data)
        except psycopg.DataError:
            if bytes(data) != b"24:00:00":
                raise
            return "24:00:00"


@dataclass(frozen=True, slots=True)
class _Context:
    """A context for new connections (``psycopg.abc.AdaptContext``)."""

    adapters: AdaptersMap
    connection: None = None


CONTEXT = _Context(AdaptersMap(psycopg.adapters))
"""The adapters of all connections of the project."""

CONTEXT.adapters.register_loader("timestamptz", _AnyTimestamptzLoader)
CONTEXT.adapters.register_loader("time", _AnyTimeLoader)


def to_microseconds(value: object) -> int | None:
    """Return a time of a column as microseconds: since 1970 in UTC, or since midnight for a time of day."""
    match value:
        case None:
            return None
        case datetime():
            offset = value.utcoffset() or timedelta()
            return (value.replace(tzinfo=None) - datetime(1970, 1, 1) - offset) // timedelta(microseconds=1)
        case time():
            of_day = datetime.combine(date.min, value) - datetime.min
            return of_day // timedelta(microseconds=1)
        case _:
            return 86_400_000_000
