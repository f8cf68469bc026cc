"""Rows of a view's table as Parquet: typed columns, zstd, the view's descriptions as field metadata."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from fhir_assets.errors import ConfigurationError
from fhir_assets.warehouse.postgres.tables.layout import TableLayout

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 10_000
"""Rows of a row group: what is held in memory at once."""

_Convert = Callable[[Any], Any]


def schema_of(layout: TableLayout) -> "pa.Schema":
    """The Arrow schema of a table. A ``numeric`` is a double, which DuckDB, Spark and Trino sum as it is; JSON is text.

    Raises ConfigurationError without pyarrow.
    """
    arrow = _pyarrow()
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
        for column in layout.columns
    ]
    return arrow.schema(fields, metadata={"comment": layout.description} if layout.description else None)


def write(path: Path, layout: TableLayout, rows: Iterable[Sequence[Any]]) -> int:
    """Write rows, in the order of the layout's columns, to a new file, a row group at a time. Returns how many."""
    arrow = _pyarrow()
    from pyarrow import parquet

    schema = schema_of(layout)
    converters = [_CONVERTERS.get(column.type) for column in layout.columns]
    count = 0
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in _batches(rows):
            count += len(batch)
            arrays = [
                arrow.array(values if convert is None else map(convert, values), type=field.type)
                for convert, values, field in zip(converters, zip(*batch, strict=True), schema, strict=True)
            ]
            writer.write_batch(arrow.record_batch(arrays, schema=schema))
    return count


def _batches(rows: Iterable[Sequence[Any]]) -> Iterator[list[Sequence[Any]]]:
    stream = iter(rows)
    while batch := list(islice(stream, BATCH_ROWS)):
        yield batch


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _json(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value, default=float).decode()


_CONVERTERS: dict[str, _Convert] = {"numeric": _number, "jsonb": _json}


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ConfigurationError("Parquet needs pyarrow: pip install 'fhir-assets[parquet]'") from None
    return pyarrow
