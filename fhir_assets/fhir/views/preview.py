"""The preview of a view: computes its rows from files, without a database, and writes them in several formats."""

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from io import StringIO
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Literal

import orjson
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from fhir_assets.control_characters import escape_control_characters
from fhir_assets.errors import ConfigurationError, NotFhir
from fhir_assets.fhir.intake import formulas
from fhir_assets.fhir.views.compiled_views import CompiledViews, Row, RowError
from fhir_assets.fhir.views.definition import View
from fhir_assets.fhir.views.plan import Column
from fhir_assets.fhir.views.resource_files import read_resources

Format = Literal["table", "csv", "ndjson", "parquet"]
_UNLIMITED_WIDTH = Console(width=100_000)
_PARQUET_BATCH = 10_000
_WHOLE_NUMBERS = {"integer", "positiveInt", "unsignedInt"}


def run_view(
    view: View,
    data: Iterable[Path],
    *,
    on_error: Callable[[str, NotFhir | RowError], None] | None = None,
    empty_join: bool = False,
) -> Iterator[Row]:
    """Yield the rows of a view over the resources of files and folders; skip resources of other types.

    If a line or an entry is not a resource, or if the view cannot compute the rows of a resource, ``on_error`` is
    called with its location (``Patient.ndjson:17``) and the error, and it is skipped; without ``on_error``, the
    error is raised. CompiledViews describes ``empty_join``; the tables use False. Raises NotFhir if a file cannot be
    opened, or if the files contain errors and not one resource.
    """
    views = CompiledViews([view], empty_join=empty_join)
    check_types = _TypeCheck(view)
    counts = Counter[str]()

    def skip(location: str, error: NotFhir) -> None:
        counts["unreadable"] += 1
        if on_error is not None:
            on_error(location, error)

    for location, resource in read_resources(data, skip if on_error else None):
        counts["resources"] += 1
        if resource["resourceType"] != view.resource_type:
            continue
        try:
            rows = views.rows(resource)[0]
            check_types(rows)
        except RowError as error:
            if on_error is None:
                raise
            on_error(location, error)
        else:
            yield from rows
    if counts["unreadable"] and not counts["resources"]:
        raise NotFhir("the files contain no resource that can be read: check that they are FHIR in JSON")


class _TypeCheck:
    """Refuses rows whose values are not of the JSON type of their column, as Parquet and Postgres would."""

    def __init__(self, view: View) -> None:
        self._view = view.name
        self._checks = [
            (n, column, _VALUE_CHECKS[column.type])
            for n, column in enumerate(view.columns)
            if column.type in _VALUE_CHECKS
        ]

    def __call__(self, rows: Sequence[Row]) -> None:
        """Raise RowError for the first value of a wrong type."""
        for row in rows:
            for n, column, is_valid in self._checks:
                values: Any = row[n] if column.collection else (row[n],)
                if not all(value is None or is_valid(value) for value in values):
                    raise RowError(self._view, column.name, f"a value is not of type {column.type}")


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


_VALUE_CHECKS = {"boolean": _is_boolean, "decimal": _is_number, **dict.fromkeys(_WHOLE_NUMBERS, _is_whole_number)}


def write_rows(rows: Iterable[Row], columns: Sequence[Column], form: Format, out: IO[bytes]) -> int:
    """Write rows to a binary stream and return their number.

    Raises ConfigurationError if ``form`` is ``parquet`` and pyarrow is not installed.
    """
    counted = _CountedRows(rows)
    {"table": write_table, "csv": write_csv, "ndjson": write_ndjson, "parquet": write_parquet}[form](
        counted, columns, out
    )
    return counted.number


class _CountedRows:
    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = rows
        self.number = 0

    def __iter__(self) -> Iterator[Row]:
        for row in self.rows:
            self.number += 1
            yield row


def _json(value: object) -> bytes:
    return orjson.dumps(value, default=float)


def _text(value: object) -> str:
    """Return a cell as text: the empty string for null, JSON for anything but a string."""
    return "" if value is None else value if isinstance(value, str) else _json(value).decode()


def _cell(value: object) -> str:
    """Return a cell of CSV. Numbers are unchanged; other text is guarded, so that no spreadsheet evaluates it."""
    text = _text(value)
    return text if isinstance(value, int | float | Decimal) else formulas.guard(text)


def write_table(rows: Iterable[Row], columns: Sequence[Column], out: IO[bytes]) -> None:
    """Write a text table, truncated to the width of a terminal, at full width in a file. Keeps all rows in memory."""
    table = Table()
    for column in columns:
        table.add_column(column.name, justify="right" if column.type in {*_WHOLE_NUMBERS, "decimal"} else "left")
    for row in rows:
        table.add_row(*(escape_control_characters(_text(value), lines=True) for value in row))
    text = StringIO()
    width = (
        Console().width if out.isatty() else Measurement.get(_UNLIMITED_WIDTH, _UNLIMITED_WIDTH.options, table).maximum
    )
    Console(file=text, width=width).print(table)
    out.write(text.getvalue().encode())


def write_csv(rows: Iterable[Row], columns: Sequence[Column], out: IO[bytes]) -> None:
    """Write CSV (RFC 4180) with a header. A collection is JSON; an apostrophe precedes text that would be a formula."""
    line = _Line()
    writer = csv.writer(line)
    for row in chain([[column.name for column in columns]], (map(_cell, row) for row in rows)):
        writer.writerow(row)
        out.write(line.take())


class _Line:
    """The buffer of one CSV line."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def take(self) -> bytes:
        text, self.text = self.text, ""
        return text.encode()


def write_ndjson(rows: Iterable[Row], columns: Sequence[Column], out: IO[bytes]) -> None:
    """Write one JSON object per row."""
    names = [column.name for column in columns]
    for row in rows:
        out.write(_json(dict(zip(names, row, strict=True))) + b"\n")


def write_parquet(rows: Iterable[Row], columns: Sequence[Column], out: IO[bytes]) -> None:
    """Write a Parquet file: numbers and booleans keep their type, collections are lists, everything else is text.

    Raises ConfigurationError if pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ConfigurationError("the format parquet needs pyarrow: pip install 'fhir-assets[parquet]'") from None
    kinds = {"boolean": pa.bool_(), "decimal": pa.float64(), **dict.fromkeys(_WHOLE_NUMBERS, pa.int64())}
    types = [kinds.get(column.type, pa.string()) for column in columns]
    schema = pa.schema(
        [
            (column.name, pa.list_(type_) if column.collection else type_)
            for column, type_ in zip(columns, types, strict=True)
        ]
    )
    converters = [
        _converter(column, as_text=type_ == pa.string()) for column, type_ in zip(columns, types, strict=True)
    ]
    stream = iter(rows)
    with parquet.ParquetWriter(out, schema) as writer:
        while batch := list(islice(stream, _PARQUET_BATCH)):
            arrays = [
                pa.array([convert(value) for value in values], type=field.type)
                for convert, values, field in zip(converters, zip(*batch, strict=True), schema, strict=True)
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _converter(column: Column, *, as_text: bool) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if value is None:
            return None
        if as_text:
            return _text(value)
        return float(value) if column.type == "decimal" else value

    return (lambda values: [convert(value) for value in values]) if column.collection else convert
