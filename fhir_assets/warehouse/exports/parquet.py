"""Parquet files of a view's rows: typed columns, compressed with zstd, with the column comments as field metadata.

``numeric`` becomes ``decimal128(38, 18)``. A value with more digits is rounded to 18 digits after the point, or null if
it has more than 20 before it; the column ``_exact_decimals`` then has its digits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from decimal import Context, Decimal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from fhir_assets.errors import ConfigurationError
from fhir_assets.warehouse.postgres.db.time_loaders import to_microseconds
from fhir_assets.warehouse.postgres.tables.layout import TableLayout

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 10_000
"""The number of rows in a row group. One row group is in memory at a time."""

PRECISION, SCALE = 38, 18
"""The number of digits of a decimal, and of digits after the point. FHIR's decimals have 18 significant digits."""

EXACT_COLUMN = "_exact_decimals"
"""The column that has the digits of decimals that do not fit. Only tables with a numeric column have it."""

_LIMIT = Decimal(10) ** (PRECISION - SCALE)
_UNIT = Decimal(1).scaleb(-SCALE)
_CONTEXT = Context(prec=PRECISION + 1)
"""One digit more than fits, because rounding may carry: 99….9 becomes 100….0."""

_Converter = Callable[[Any], Any]


def build_schema(layout: TableLayout) -> "pa.Schema":
    """Return the Arrow schema of a table: ``numeric`` becomes a decimal, and jsonb text.

    Raises ConfigurationError if pyarrow is not installed.
    """
    arrow = _import_pyarrow()
    types = {
        "text": arrow.string(),
        "boolean": arrow.bool_(),
        "integer": arrow.int32(),
        "bigint": arrow.int64(),
        "numeric": arrow.decimal128(PRECISION, SCALE),
        "date": arrow.date32(),
        "timestamp with time zone": arrow.timestamp("us", tz="UTC"),
        "time without time zone": arrow.time64("us"),
        "jsonb": arrow.string(),
        "text[]": arrow.list_(arrow.string()),
    }
    fields = [
        arrow.field(
            column.name,
            types[column.type],
            nullable=not column.required,
            metadata={"comment": column.description} if column.description else None,
        )
        for column in layout.readable_columns
    ]
    if _has_decimals(layout):
        comment = f"JSON: the digits of decimals of this row that do not fit decimal({PRECISION}, {SCALE}), by column"
        fields.append(arrow.field(EXACT_COLUMN, arrow.string(), metadata={"comment": comment}))
    return arrow.schema(fields, metadata={"comment": layout.description} if layout.description else None)


def _has_decimals(layout: TableLayout) -> bool:
    return any(column.type == "numeric" for column in layout.readable_columns)


def write(path: Path, layout: TableLayout, rows: Iterable[Sequence[Any]]) -> int:
    """Write rows, whose values are in the order of the layout's columns, to a new file. Returns the number of rows."""
    arrow = _import_pyarrow()
    from pyarrow import parquet

    schema = build_schema(layout)
    converters = [_CONVERTERS.get(column.type) for column in layout.readable_columns]
    has_decimals = _has_decimals(layout)
    count = 0
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in _split(rows):
            count += len(batch)
            exact: dict[int, dict[str, str]] = {}
            arrays = [
                _build_array(values if convert is None else [convert(value) for value in values], field, exact)
                for convert, values, field in zip(converters, zip(*batch, strict=True), schema, strict=False)
            ]
            if has_decimals:
                texts = [orjson.dumps(exact[row]).decode() if row in exact else None for row in range(len(batch))]
                arrays.append(arrow.array(texts, type=arrow.string()))
            writer.write_batch(arrow.record_batch(arrays, schema=schema))
    return count


def _build_decimals(values: Sequence[Any], field: "pa.Field", exact: dict[int, dict[str, str]]) -> "pa.Array":
    """Return an Arrow array of decimals, and add the digits of those that do not fit to ``exact``, by row."""
    arrow = _import_pyarrow()
    try:
        return arrow.array(values, type=field.type)
    except arrow.ArrowInvalid:
        fitting = list(values)
        for row, value in enumerate(values):
            if value is not None and not _fits(value):
                exact.setdefault(row, {})[field.name] = f"{value:f}"
                fitting[row] = _round(value)
        return arrow.array(fitting, type=field.type)


def _fits(value: Decimal) -> bool:
    exponent = value.as_tuple().exponent
    return isinstance(exponent, int) and exponent >= -SCALE and -_LIMIT < value < _LIMIT


def _round(value: Decimal) -> Decimal | None:
    """Return the nearest decimal that fits, None if there is none."""
    if not value.is_finite() or not -_LIMIT < value < _LIMIT:
        return None
    rounded = value.quantize(_UNIT, context=_CONTEXT)
    return rounded if -_LIMIT < rounded < _LIMIT else None


def _build_array(values: Sequence[Any], field: "pa.Field", exact: dict[int, dict[str, str]]) -> "pa.Array":
    """Return an Arrow array. Times that Arrow cannot convert from Python objects are passed as microseconds."""
    arrow = _import_pyarrow()
    arrow_type = field.type
    if arrow.types.is_decimal(arrow_type):
        return _build_decimals(values, field, exact)
    is_time = arrow.types.is_timestamp(arrow_type) or arrow.types.is_time(arrow_type)
    if is_time and any(_is_unusual(value) for value in values):
        return arrow.array([to_microseconds(value) for value in values], type=arrow.int64()).cast(arrow_type)
    return arrow.array(values, type=arrow_type)


def _is_unusual(value: Any) -> bool:
    """Return whether a time is one that ``time_loaders`` loads as text or in a zone other than UTC."""
    return value.__class__ is str or (value.__class__ is datetime and value.year in (1, 9999))


def _split(rows: Iterable[Sequence[Any]]) -> Iterator[list[Sequence[Any]]]:
    stream = iter(rows)
    while batch := list(islice(stream, BATCH_ROWS)):
        yield batch


def _to_json(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value, default=float).decode()


_CONVERTERS: dict[str, _Converter] = {"jsonb": _to_json}


def _import_pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ConfigurationError("Parquet requires pyarrow: pip install 'fhir-assets[parquet]'") from None
    return pyarrow
