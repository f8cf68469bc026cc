"""The differences between the tables of views and their layouts."""

from dataclasses import dataclass
from typing import Literal, LiteralString

from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.tables.layout import (
    KEY_COLUMN,
    LOADED_AT_COLUMN,
    SOURCE_COLUMN,
    TableColumn,
    TableLayout,
)

SCHEMA = "fhir"
SOURCE = TableColumn(SOURCE_COLUMN, "text", "Key of the source of the resource", required=True)
"""A column of every table that is not part of the layout. The session that copies rows determines its value."""

DEFAULTS: dict[str, LiteralString] = {SOURCE_COLUMN: "ops.current_source()", LOADED_AT_COLUMN: "now()"}
"""The defaults of the columns that no load writes."""


@dataclass(frozen=True, slots=True)
class Drift:
    """One difference between a table and its view.

    For a column, ``expected`` is its Postgres type in the view and ``actual`` its type in the table, None if the
    column does not exist there.
    """

    view: str
    kind: Literal["table", "column", "index"]
    name: str
    expected: str | None
    actual: str | None

    @property
    def safe(self) -> bool:
        """True if the difference can be removed without loss of data: nothing except ``_resource_key`` is dropped."""
        return self.actual is None or (self.expected is None and self.name == KEY_COLUMN)

    @property
    def leaves_rows_valid(self) -> bool:
        """True if the rows of the table need not be written again."""
        return self.kind == "index" or not self.expected or self.name in DEFAULTS

    def __str__(self) -> str:
        if self.kind != "column":
            return f"{self.kind} {self.name} is missing"
        if self.expected is None:
            return f"column {self.name} is in the table but not in the view"
        if self.actual is None:
            return f"column {self.name} is in the view but not in the table"
        return f"column {self.name} is {self.actual} in the table but {self.expected} in the view"


def compare(conn: Connection, layout: TableLayout) -> list[Drift]:
    """Return the differences between a table and its layout; an empty list if there are none."""
    actual: dict[str, str] = dict(
        conn.execute(
            """
            SELECT a.attname, format_type(a.atttypid, a.atttypmod)
            FROM pg_attribute a
            JOIN pg_class c ON c.oid = a.attrelid
            WHERE c.relnamespace = %s::regnamespace
                AND c.relname = %s
                AND c.relkind = 'r'
                AND a.attnum > 0
                AND NOT a.attisdropped
            """,
            [SCHEMA, layout.name],
        ).fetchall()
    )
    if not actual:
        return [Drift(layout.name, "table", layout.name, "table", None)]
    expected = {column.name: column for column in list_columns(layout)}
    changes = [
        Drift(layout.name, "column", name, column.type, actual.get(name))
        for name, column in expected.items()
        if actual.get(name) != column.type
    ]
    changes += [Drift(layout.name, "column", name, None, kind) for name, kind in actual.items() if name not in expected]
    indexed = find_indexed_columns(conn, layout)
    changes += [
        Drift(layout.name, "index", name, column.index, None)
        for name, column in expected.items()
        if column.index and name not in indexed
    ]
    if layout.identity and not has_primary_key(conn, layout):
        changes.append(Drift(layout.name, "index", f"of the primary key {', '.join(layout.identity)}", "btree", None))
    return changes


def list_columns(layout: TableLayout) -> tuple[TableColumn, ...]:
    """Return all columns of the table of a layout."""
    return (*layout.readable_columns, SOURCE)


def has_primary_key(conn: Connection, layout: TableLayout) -> bool:
    """Return whether the table has the primary key of its layout."""
    row = conn.execute(
        """
        SELECT array_agg(a.attname::text ORDER BY k.position)
        FROM pg_index i
        JOIN pg_class c ON c.oid = i.indrelid
        CROSS JOIN unnest(i.indkey::int2[]) WITH ORDINALITY AS k (attnum, position)
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
        WHERE c.relnamespace = %s::regnamespace
            AND c.relname = %s
            AND i.indisprimary
        """,
        [SCHEMA, layout.name],
    ).fetchone()
    return row is not None and row[0] == [*layout.identity, SOURCE_COLUMN]


def find_indexed_columns(conn: Connection, layout: TableLayout) -> set[str]:
    """Return the columns that are the first column of an index."""
    rows = conn.execute(
        """
        SELECT a.attname
        FROM pg_index i
        JOIN pg_class c ON c.oid = i.indrelid
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
        WHERE c.relnamespace = %s::regnamespace
            AND c.relname = %s
        """,
        [SCHEMA, layout.name],
    ).fetchall()
    return {row[0] for row in rows}
