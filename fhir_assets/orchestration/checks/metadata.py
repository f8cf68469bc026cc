"""Tables in a check's metadata: rules, paths, windows and counts, never a resource or its values."""

from collections.abc import Sequence
from functools import cache

import dagster as dg


def rows_table(columns: Sequence[str], rows: Sequence[Sequence[str | int | float | None]]) -> dg.MetadataValue:
    """Rows under ``columns``, each ``name`` or ``name:type``."""
    schema = _schema(tuple(columns))
    names = [column.name for column in schema.columns]
    return dg.MetadataValue.table([dg.TableRecord(dict(zip(names, row, strict=True))) for row in rows], schema=schema)


@cache
def _schema(columns: tuple[str, ...]) -> dg.TableSchema:
    """One object for all tables of a kind: the checks of a range make thousands, and what they share is packed once."""
    named = (column.partition(":") for column in columns)
    return dg.TableSchema([dg.TableColumn(name, kind or "string") for name, _, kind in named])
