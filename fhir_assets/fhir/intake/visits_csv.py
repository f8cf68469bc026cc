"""Visits as CSV (RFC 4180), written for the landing zone and read from it line by line.

A malformed row does not affect the rows after it. By RFC 4180, a quote that is not closed makes all following lines
part of its row; here only the first line is rejected, and the lines after it are read as rows of their own.
"""

import csv
import io
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import orjson

from fhir_assets.fhir.intake import schemas
from fhir_assets.fhir.lines import split_lines

COLUMNS: tuple[str, ...] = tuple(schemas.load_schema("visit")["properties"])
REQUIRED: tuple[str, ...] = tuple(schemas.load_schema("visit")["required"])

MAX_LINE_BYTES = 1 << 16
"""The longest line that is read."""

MAX_ROW_BYTES = 1 << 14
"""The longest row whose quoted values span lines."""

HEADER_RULE = "csv-header"
ROW_RULE = "csv"
SCHEMA_RULE = "schema"

_is_formula = re.compile(r"'*[=+\-@\t\r]").match
_is_escaped = re.compile(r"'+[=+\-@\t\r]").match

_is_valid = schemas.compile_text_check("visit")


@dataclass(frozen=True, slots=True)
class Visit:
    """A valid visit. ``location`` is its file and line; ``arrived`` is the time at which its file was written."""

    row: Mapping[str, str] = field(repr=False)
    location: str
    arrived: datetime


@dataclass(frozen=True, slots=True)
class InvalidRow:
    """A row that is not a valid visit.

    ``problems`` are all of its errors as pairs of a column, which may be empty, and a message. ``body`` is the input:
    the values by column as JSON, or the line as read. Messages do not contain values.
    """

    line: int
    rule: str
    problems: tuple[tuple[str, str], ...]
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class ValidRow:
    """A row that conforms to the schema of a visit."""

    line: int
    values: Mapping[str, str] = field(repr=False)


def write(rows: Iterable[Mapping[str, str]]) -> bytes:
    """Return a CSV file of visits with its header.

    An apostrophe is put before a value that a spreadsheet would evaluate as a formula.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    writer.writerows([_escape(row.get(column, "")) for column in COLUMNS] for row in rows)
    return text.getvalue().encode()


def read(chunks: Iterable[bytes]) -> Iterator[ValidRow | InvalidRow]:
    """Read the rows of a file, without the header and without empty rows. Reading ends at an invalid header."""
    lines = _Lines(chunks)
    columns: Sequence[str] = ()
    for number, line in lines:
        if line is None:
            yield InvalidRow(number, ROW_RULE, (("", f"a line of more than {MAX_LINE_BYTES:,} bytes"),))
            continue
        values, text = _read_row(lines, line, len(columns))
        if values is not None and not any(values):
            continue
        if not columns:
            columns = [name.strip().lower() for name in values or ()]
            if problems := _header_problems(columns):
                yield InvalidRow(number, HEADER_RULE, problems)
                return
        elif values is None:
            yield InvalidRow(number, ROW_RULE, (("", "not CSV in UTF-8, or a quote that is not closed"),), text)
        elif len(values) != len(columns):
            message = f"{len(values)} values, where the header has {len(columns)} columns"
            yield InvalidRow(number, ROW_RULE, (("", message),), text)
        else:
            yield _validate(number, dict(zip(columns, map(_unescape, values), strict=True)))


def find_errors(row: object) -> tuple[tuple[str, str], ...]:
    """Return all errors of a visit as pairs of a JSON Pointer and a message."""
    if isinstance(row, dict) and all(isinstance(value, str) for value in row.values()) and _is_valid(row):
        return ()
    return tuple((error.path, error.message) for error in schemas.find_errors("visit", row))


def _validate(number: int, row: dict[str, str]) -> ValidRow | InvalidRow:
    if _is_valid(row):
        return ValidRow(number, row)
    # An empty value in a file means that the member is missing.
    visit = {column: value for column, value in row.items() if value or column == "reason"}
    problems = tuple((path.removeprefix("/"), message) for path, message in find_errors(visit))
    return InvalidRow(number, SCHEMA_RULE, problems, orjson.dumps(row))


def _header_problems(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return the errors of a header. Unknown columns are counted, not named: a first line may contain patient data."""
    problems = []
    if missing := [name for name in REQUIRED if name not in names]:
        problems.append(("", f"the header lacks {', '.join(missing)}"))
    if unknown := sum(name not in COLUMNS for name in names):
        problems.append(("", f"the header has {unknown} unknown columns; known are {', '.join(COLUMNS)}"))
    if duplicates := sorted({name for name in names if name in COLUMNS and names.count(name) > 1}):
        problems.append(("", f"the header has {', '.join(duplicates)} more than once"))
    return tuple(problems)


class _Lines:
    """An iterator of numbered lines that lets a reader put lines back."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._lines = (line for lines in split_lines(chunks, MAX_LINE_BYTES) for line in lines)
        self._returned: deque[bytes | None] = deque()
        self._number = 0

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        return self

    def __next__(self) -> tuple[int, bytes | None]:
        line = self._returned.popleft() if self._returned else next(self._lines)
        self._number += 1
        return self._number, line

    def put_back(self, lines: Sequence[bytes | None]) -> None:
        """Return lines that were read, so that they are read again."""
        self._returned.extendleft(reversed(lines))
        self._number -= len(lines)


def _read_row(lines: _Lines, first: bytes, width: int) -> tuple[list[str] | None, bytes]:
    """Return the values of the row that begins with ``first``, None if it is not CSV, and the text of the row.

    A row continues over lines until the number of its quotes is even. If the result does not have ``width`` values
    (0 means any number), only its first line is taken as the row, and the other lines are put back.
    """
    taken: list[bytes | None] = [first]
    text = first
    while text.count(b'"') % 2 and len(text) <= MAX_ROW_BYTES:
        number, line = next(lines, (0, None))
        if number:
            taken.append(line)
        if line is None:
            break
        text += b"\n" + line
    values = _parse(text.removesuffix(b"\r"))
    if len(taken) > 1 and (values is None or len(values) != width > 0):
        lines.put_back(taken[1:])
        return _parse(first.removesuffix(b"\r")), first
    return values, text


def _parse(text: bytes) -> list[str] | None:
    try:
        rows = list(csv.reader([text.decode()], strict=True))
    except (csv.Error, UnicodeDecodeError):
        return None
    return rows[0] if rows else []


def _escape(value: str) -> str:
    return f"'{value}" if _is_formula(value) else value


def _unescape(value: str) -> str:
    return value[1:] if _is_escaped(value) else value
