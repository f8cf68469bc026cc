"""Warnings about a table that Postgres can have, but that other programs or full rows cannot cope with."""

from collections import defaultdict

from fhir_assets.warehouse.postgres.tables.layout import TableLayout

LAKE_PARTITION = "partition_key"
"""The column that a reader of the lake takes from the names of its folders."""

_PAGE_BYTES = 8160
"""The size of a row that Postgres cannot move out of its page."""

_FIXED_BYTES = {
    "boolean": 1,
    "integer": 4,
    "date": 4,
    "bigint": 8,
    "timestamp with time zone": 8,
    "time without time zone": 8,
}
_POINTER_BYTES = 18
"""The size of a value of other types that Postgres stores outside of the row."""


def find_warnings(layout: TableLayout) -> list[str]:
    """Return sentences about what readers of a table, or rows with a value in every column, will meet."""
    return [*_warn_of_case(layout), *_warn_of_lake(layout), *_warn_of_width(layout)]


def _warn_of_case(layout: TableLayout) -> list[str]:
    names = defaultdict(list)
    for column in layout.readable_columns:
        names[column.name.lower()].append(column.name)
    return [
        f"view {layout.name}: the columns {' and '.join(alike)} differ by upper and lower case only, which DuckDB, "
        "Excel and SQL without quotes do not tell apart; rename one"
        for alike in names.values()
        if len(alike) > 1
    ]


def _warn_of_lake(layout: TableLayout) -> list[str]:
    return [
        f"view {layout.name}: readers of the lake replace column {column.name} by the window in the name of the folder:"
        " rename it"
        for column in layout.columns
        if column.name.lower() == LAKE_PARTITION
    ]


def _warn_of_width(layout: TableLayout) -> list[str]:
    columns = layout.readable_columns
    size = sum(_FIXED_BYTES.get(column.type, _POINTER_BYTES) for column in columns) + len(columns) // 8 + 24
    if size <= _PAGE_BYTES:
        return []
    return [
        f"view {layout.name}: a row with a value in each of its {len(columns)} columns needs {size} bytes, and a row "
        f"in Postgres has at most {_PAGE_BYTES}: resources with that many values become dead letters; split the view"
    ]
