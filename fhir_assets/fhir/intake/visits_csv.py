"""Visits as CSV (RFC 4180), written for the landing zone and read from it line by line.

A malformed row does not affect the rows after it. By RFC 4180, a quote that is not closed makes all following lines
part of its row; here only the first line is rejected, and the lines after it are read as rows of their own.
"""

import csv
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import orjson

from fhir_assets.fhir.intake import cells, csv_text, formulas, schemas
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
    writer.writerows([formulas.guard(row.get(column, "")) for column in COLUMNS] for row in rows)
    return text.getvalue().encode()


def read(chunks: Iterable[bytes]) -> Iterator[ValidRow | InvalidRow]:
    """Read the rows of a file, without the header and without empty rows. Reading ends at an invalid header.

    The delimiter is that of the header, or of a line ``sep=;`` before it. Encodings and line ends are those of
    ``csv_text.decode``. Empty columns at the end, which spreadsheets add, are left out.
    """
    number = 0
    is_plausible = cells.compile_visit_check()
    try:
        lines = _Lines(csv_text.decode(chunks))
        form: _Form | None = None
        for number, line in lines:
            if line is None:
                yield InvalidRow(number, ROW_RULE, (("", f"a line of more than {MAX_LINE_BYTES:,} bytes"),))
            elif form is None or not form.columns:
                form = _read_header(line, form)
                if form.columns and (problems := _header_problems(form.columns)):
                    yield InvalidRow(number, HEADER_RULE, problems)
                    return
            elif (row := _read_values(lines, number, line, form)) is not None:
                yield row if isinstance(row, InvalidRow) else _validate(number, row, is_plausible)
    except csv_text.UnreadableText as error:
        yield InvalidRow(number + 1, HEADER_RULE, (("", str(error)),))


@dataclass(frozen=True, slots=True)
class _Form:
    """The delimiter of a file, None if the header decides, and its columns, empty before the header."""

    delimiter: str | None
    columns: Sequence[str] = ()


def _read_header(line: bytes, form: _Form | None) -> _Form:
    """Return the form of a file after a line before its first row: ``sep=;``, an empty line, or the header."""
    text = line.decode(errors="replace").rstrip("\r")
    if form is None and (delimiter := csv_text.read_separator_line(text)):
        return _Form(delimiter)
    stated = form.delimiter if form else None
    delimiter = stated or csv_text.find_delimiter(text, COLUMNS)
    columns = [
        name.strip().lower() for name in _parse(line.rstrip(b"\r"), delimiter) or (text if text.strip() else "",)
    ]
    while columns and not columns[-1]:
        columns.pop()
    return _Form(delimiter if columns else stated, columns)


def _read_values(lines: "_Lines", number: int, line: bytes, form: _Form) -> dict[str, str] | InvalidRow | None:
    """Return the values of a row by column; None for an empty row."""
    values, text = _read_row(lines, line, len(form.columns), form.delimiter or ",")
    if values is None:
        return InvalidRow(number, ROW_RULE, (("", "not CSV in UTF-8, or a quote that is not closed"),), text)
    if not any(values):
        return None
    if len(values) != len(form.columns):
        message = f"{len(values)} values, where the header has {len(form.columns)} columns"
        return InvalidRow(number, ROW_RULE, (("", message),), text)
    return dict(zip(form.columns, map(_unescape, values), strict=True))


def find_errors(row: object) -> tuple[tuple[str, str], ...]:
    """Return all errors of a visit as pairs of a JSON Pointer and a message."""
    if not (isinstance(row, dict) and all(isinstance(value, str) for value in row.values()) and _is_valid(row)):
        return tuple((error.path, error.message) for error in schemas.find_errors("visit", row))
    unwrapped = {column: cells.unwrap(value) for column, value in row.items()}
    if unwrapped != row:
        return find_errors(unwrapped)
    return tuple((f"/{column}", message) for column, message in cells.find_visit_problems(row))


def _validate(
    number: int, row: dict[str, str], is_plausible: Callable[[Mapping[str, str]], bool]
) -> ValidRow | InvalidRow:
    if _is_valid(row) and is_plausible(row):
        return ValidRow(number, row)
    # An empty value in a file means that the member is missing.
    visit = {column: value for column, value in row.items() if value or column == "reason"}
    problems = tuple((path.removeprefix("/"), message) for path, message in find_errors(visit))
    return InvalidRow(number, SCHEMA_RULE, problems, orjson.dumps(row)) if problems else ValidRow(number, row)


def _header_problems(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return the errors of a header. Unknown columns are counted, not named: a first line may contain patient data."""
    problems = []
    if missing := [name for name in REQUIRED if name not in names]:
        problems.append(("", f"the header lacks {', '.join(missing)}"))
    if unknown := sum(name not in COLUMNS for name in names):
        problems.append(("", f"the header has {unknown} unknown columns; the known ones are {', '.join(COLUMNS)}"))
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


def _read_row(lines: _Lines, first: bytes, width: int, delimiter: str) -> tuple[list[str] | None, bytes]:
    """Return the values of the row that begins with ``first``, None if it is not CSV, and the text of the row.

    A row continues over lines until the number of its quotes is even. If the result does not have ``width`` values,
    only its first line is taken as the row, and the other lines are put back. Empty values after ``width`` values are
    left out.
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
    values = _trim(_parse(text.rstrip(b"\r"), delimiter), width)
    if len(taken) > 1 and (values is None or len(values) != width):
        lines.put_back(taken[1:])
        return _trim(_parse(first.rstrip(b"\r"), delimiter), width), first
    return values, text


def _trim(values: list[str] | None, width: int) -> list[str] | None:
    return values[:width] if values and len(values) > width and not any(values[width:]) else values


def _parse(text: bytes, delimiter: str) -> list[str] | None:
    try:
        rows = list(csv.reader([text.decode()], delimiter=delimiter, strict=True))
    except (csv.Error, UnicodeDecodeError):
        return None
    return rows[0] if rows else []


def _unescape(value: str) -> str:
    if value[:1] not in ("'", "="):
        return value
    return cells.unwrap(formulas.remove_guard(value))
