"""Parquet files of a view's rows: typed columns, compressed with zstd, with the column comments as field metadata."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
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

_Converter = Callable[[Any], Any]


def build_schema(layout: TableLayout) -> "pa.Schema":
    """Return the Arrow schema of a table: ``numeric`` becomes a double, which every engine can sum, and jsonb text.

    Raises ConfigurationError if pyarrow is not installed.
    """
    arrow = _import_pyarrow()
    types = {
        "text": arrow.string(),
        "boolean": arrow.bool_(),
        "integer": arrow.int32(),
        "bigint": arrow.int64(),
        "numeric": arrow.float64(),
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
    return arrow.schema(fields, metadata={"comment": layout.description} if layout.description else None)


def write(path: Path, layout: TableLayout, rows: Iterable[Sequence[Any]]) -> int:
    """Write rows, whose values are in the order of the layout's columns, to a new file. Returns the number of rows."""
    arrow = _import_pyarrow()
    from pyarrow import parquet

    schema = build_schema(layout)
    converters = [_CONVERTERS.get(column.type) for column in layout.readable_columns]
    count = 0
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in _split(rows):
            count += len(batch)
            arrays = [
                _build_array(values if convert is None else [convert(value) for value in values], field.type)
                for convert, values, field in zip(converters, zip(*batch, strict=True), schema, strict=True)
            ]
            writer.write_batch(arrow.record_batch(arrays, schema=schema))
    return count


def _build_array(values: Sequence[Any], arrow_type: "pa.DataType") -> "pa.Array":
    """Return an Arrow array. Times that Arrow does not take from Python are passed as microseconds."""
    arrow = _import_pyarrow()
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


def _to_float(value: Any) -> float | None:
    return None if value is None else float(value)


def _to_json(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value, default=float).decode()


_CONVERTERS: dict[str, _Converter] = {"numeric": _to_float, "jsonb": _to_json}


def _import_pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ConfigurationError("Parquet requires pyarrow: pip install 'fhir-assets[parquet]'") from None
    return pyarrow
