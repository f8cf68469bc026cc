"""Visits as CSV (RFC 4180): written for the landing zone, and read from it, a line at a time.

A row that cannot be read never takes its neighbours along. One with a quote that is not closed would swallow all that
follows: it is given up alone, and what comes after it is read anew.
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

LONGEST_LINE = 1 << 16
"""Bytes of a line."""

LONGEST_ROW = 1 << 14
"""Bytes of a row whose quoted values span lines."""

HEADER_RULE = "csv-header"
ROW_RULE = "csv"
SCHEMA_RULE = "schema"

_FORMULA = re.compile(r"'*[=+\-@\t\r]").match
_GUARDED = re.compile(r"'+[=+\-@\t\r]").match

_fits = schemas.compile_text_check("visit")


@dataclass(frozen=True, slots=True)
class Visit:
    """A valid row. ``place`` says where it stands, ``arrived`` when its file was written."""

    row: Mapping[str, str] = field(repr=False)
    place: str
    arrived: datetime


@dataclass(frozen=True, slots=True)
class InvalidRow:
    """A row that is no visit: ``problems`` are all that is wrong with it, each with its column where it has one.

    ``body`` is what was read: the values by column, or the line as it is. No message holds any of it.
    """

    line: int
    rule: str
    problems: tuple[tuple[str, str], ...]
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class ValidRow:
    """A row that fits the schema of a visit."""

    line: int
    values: Mapping[str, str] = field(repr=False)


def write(rows: Iterable[Mapping[str, str]]) -> bytes:
    """A file of visits with its header. What a spreadsheet would take for a formula is put behind an apostrophe."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    writer.writerows([_guarded(row.get(column, "")) for column in COLUMNS] for row in rows)
    return text.getvalue().encode()


def read(chunks: Iterable[bytes]) -> Iterator[ValidRow | InvalidRow]:
    """The rows of a file, without its header and empty ones. A header that does not fit ends the reading."""
    lines = _Lines(chunks)
    columns: Sequence[str] = ()
    for number, line in lines:
        if line is None:
            yield InvalidRow(number, ROW_RULE, (("", f"a line of more than {LONGEST_LINE:,} bytes"),))
            continue
        values, text = _record(lines, line, len(columns))
        if values is not None and not any(values):
            continue
        if not columns:
            columns = [name.strip().lower() for name in values or ()]
            if problems := _header_problems(columns):
                yield InvalidRow(number, HEADER_RULE, problems)
                return
        elif values is None:
            yield InvalidRow(number, ROW_RULE, (("", "no CSV in UTF-8, or a quote that is not closed"),), text)
        elif len(values) != len(columns):
            said = f"{len(values)} values, where the header has {len(columns)} columns"
            yield InvalidRow(number, ROW_RULE, (("", said),), text)
        else:
            yield _judged(number, dict(zip(columns, map(_bare, values), strict=True)))


def find_errors(row: object) -> tuple[tuple[str, str], ...]:
    """All that is wrong with a visit: where, as a JSON Pointer, and what is expected there."""
    if isinstance(row, dict) and all(isinstance(value, str) for value in row.values()) and _fits(row):
        return ()
    return tuple((each.path, each.message) for each in schemas.find_errors("visit", row))


def _judged(number: int, row: dict[str, str]) -> ValidRow | InvalidRow:
    if _fits(row):
        return ValidRow(number, row)
    # What a file leaves empty is not there at all.
    given = {column: value for column, value in row.items() if value or column == "reason"}
    problems = tuple((path.removeprefix("/"), said) for path, said in find_errors(given))
    return InvalidRow(number, SCHEMA_RULE, problems, orjson.dumps(row))


def _header_problems(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Columns are named only where they are ours: a file without a header has a patient in its first line."""
    problems = []
    if missing := [name for name in REQUIRED if name not in names]:
        problems.append(("", f"the header lacks {', '.join(missing)}"))
    if unknown := sum(name not in COLUMNS for name in names):
        problems.append(("", f"the header has {unknown} columns that are not known; known are {', '.join(COLUMNS)}"))
    if twice := sorted({name for name in names if name in COLUMNS and names.count(name) > 1}):
        problems.append(("", f"the header has {', '.join(twice)} more than once"))
    return tuple(problems)


class _Lines:
    """Numbered lines, of which some can be put back."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._lines = (line for lines in split_lines(chunks, LONGEST_LINE) for line in lines)
        self._back: deque[bytes | None] = deque()
        self._number = 0

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        return self

    def __next__(self) -> tuple[int, bytes | None]:
        line = self._back.popleft() if self._back else next(self._lines)
        self._number += 1
        return self._number, line

    def put_back(self, lines: Sequence[bytes | None]) -> None:
        self._back.extendleft(reversed(lines))
        self._number -= len(lines)


def _record(lines: _Lines, first: bytes, width: int) -> tuple[list[str] | None, bytes]:
    """The values of the row that begins with a line, None if it is no CSV; and its text.

    A row goes on over lines until its quotes are even. If what that gives is none of ``width`` values (0: any), the
    row is its first line alone, whatever that is worth, and the others are put back.
    """
    taken: list[bytes | None] = [first]
    text = first
    while text.count(b'"') % 2 and len(text) <= LONGEST_ROW:
        number, line = next(lines, (0, None))
        if number:
            taken.append(line)
        if line is None:
            break
        text += b"\n" + line
    values = _parsed(text.removesuffix(b"\r"))
    if len(taken) > 1 and (values is None or len(values) != width > 0):
        lines.put_back(taken[1:])
        return _parsed(first.removesuffix(b"\r")), first
    return values, text


def _parsed(text: bytes) -> list[str] | None:
    try:
        rows = list(csv.reader([text.decode()], strict=True))
    except (csv.Error, UnicodeDecodeError):
        return None
    return rows[0] if rows else []


def _guarded(value: str) -> str:
    return f"'{value}" if _FORMULA(value) else value


def _bare(value: str) -> str:
    return value[1:] if _GUARDED(value) else value
