"""Tables in a check's metadata: rules, paths, windows and counts, never a resource or its values."""

from collections.abc import Sequence

import dagster as dg


def rows_table(columns: Sequence[str], rows: Sequence[Sequence[str | int | float | None]]) -> dg.MetadataValue:
    """Rows under ``columns``, each ``name`` or ``name:type``."""
    named = [(name, kind or "string") for name, _, kind in (column.partition(":") for column in columns)]
    return dg.MetadataValue.table(
        [dg.TableRecord(dict(zip([name for name, _ in named], row, strict=True))) for row in rows],
        schema=dg.TableSchema([dg.TableColumn(name, kind) for name, kind in named]),
    )
