"""CSV files of a view's rows (RFC 4180), for data tools and for spreadsheets.

Text is quoted and null is empty, so that an empty text differs from null and a code that looks like a number is marked
as text. Times always have six fractional digits. Text that a spreadsheet would evaluate as a formula begins with an
apostrophe, as in the files of visits (``fhir/intake/formulas.py``). Values of jsonb and array columns are JSON.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, time
from typing import Any, BinaryIO

import orjson

from fhir_assets.fhir.intake import formulas
from fhir_assets.warehouse.postgres.tables.layout import TableColumn

_FLUSH_CHARACTERS = 1 << 20
_BYTE_ORDER_MARK = "\ufeff"

_MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
_looks_numeric = re.compile(
    r"[\d.,][\d.,:/ -]*(?:[eE][+-]?\d+)?%?|true|false"
    rf"|(?:{_MONTHS})[a-z]*[-/ .]?\d{{1,4}}"
    rf"|\d{{1,2}}[-/ ]?(?:{_MONTHS})[a-z]*(?:[-/ .]?\d{{1,4}})?",
    re.IGNORECASE,
).fullmatch
"""Whether a spreadsheet may interpret a text as a number, a date, a time or a truth value."""


def write(file: BinaryIO, columns: Sequence[TableColumn], rows: Iterable[Sequence[Any]], *, excel: bool = False) -> int:
    """Write a header and rows, whose values are in the order of ``columns``. Return the number of rows.

    With ``excel``, the file begins with a byte order mark, by which Excel recognizes UTF-8. Text that Excel would
    interpret as a number or a date is written as ``="0123"``, which it shows as text.
    """
    formats = [_choose_format(column.type, _quote_for_excel if excel else _quote) for column in columns]
    count, size = 0, 0
    lines = [(_BYTE_ORDER_MARK if excel else "") + ",".join(column.name for column in columns)]
    for row in rows:
        line = ",".join(["" if value is None else format_(value) for format_, value in zip(formats, row, strict=True)])
        lines.append(line)
        count += 1
        size += len(line)
        if size >= _FLUSH_CHARACTERS:
            file.write(_join(lines))
            lines, size = [], 0
    file.write(_join(lines))
    return count


def _join(lines: Sequence[str]) -> bytes:
    return "".join([f"{line}\r\n" for line in lines]).encode()


def _choose_format(column_type: str, quote: Callable[[str], str]) -> Callable[[Any], str]:
    """Return the function that writes a value of a column."""
    if column_type == "text":
        return quote
    if column_type in ("jsonb", "text[]"):
        return lambda value: quote(value) if value.__class__ is str else _quote(format_json(value))
    return SCALARS.get(column_type, str)


def format_json(value: Any) -> str:
    """Return the value of a jsonb or array column as JSON."""
    return orjson.dumps(value, default=str).decode()


def format_time(value: Any) -> str:
    """Return a time in ISO 8601 with six fractional digits. A time that is loaded as text is 24:00:00."""
    if isinstance(value, datetime | time):
        return value.isoformat(timespec="microseconds")
    return f"{value}.000000"


def format_decimal(value: Any) -> str:
    """Return a number with its digits, without an exponent."""
    return f"{value:f}"


SCALARS: dict[str, Callable[[Any], str]] = {
    "numeric": format_decimal,
    "timestamp with time zone": format_time,
    "time without time zone": format_time,
}
"""The functions that write numbers and times as text, by the type of the column."""


def _quote(text: str) -> str:
    return '"' + formulas.guard(text).replace('"', '""') + '"'


def _quote_for_excel(text: str) -> str:
    if _looks_numeric(text):
        return f'"=""{text}"""'
    return _quote(text)
