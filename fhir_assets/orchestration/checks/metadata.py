"""Tables in the metadata of checks: rules, paths, windows and counts, never a resource or its values."""

from collections.abc import Sequence
from functools import cache

import dagster as dg


def rows_table(columns: Sequence[str], rows: Sequence[Sequence[str | int | float | None]]) -> dg.MetadataValue:
    """Return a metadata table of ``rows``. A column is given as ``name`` (a string) or ``name:type``."""
    schema = _build_schema(tuple(columns))
    names = [column.name for column in schema.columns]
    return dg.MetadataValue.table([dg.TableRecord(dict(zip(names, row, strict=True))) for row in rows], schema=schema)


@cache
def _build_schema(columns: tuple[str, ...]) -> dg.TableSchema:
    """Return one schema object for all tables with these columns. The event log serializes it only once for a batch."""
    parts = (column.partition(":") for column in columns)
    return dg.TableSchema([dg.TableColumn(name, kind or "string") for name, _, kind in parts])
