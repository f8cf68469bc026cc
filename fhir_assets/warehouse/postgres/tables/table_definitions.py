"""The statements that create and change the tables of views."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import LiteralString

import psycopg
from psycopg import sql

from fhir_assets.warehouse.postgres.db import roles
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.tables.layout import KEY_COLUMN, SOURCE_COLUMN, TableColumn, TableLayout
from fhir_assets.warehouse.postgres.tables.table_differences import (
    DEFAULTS,
    SCHEMA,
    Drift,
    find_indexed_columns,
    has_primary_key,
    list_columns,
)


def apply_layout(conn: Connection, layout: TableLayout, changes: Sequence[Drift], *, cascade: bool) -> bool:
    """Create the table of a layout, or apply ``changes`` to it, with its keys, indexes and comments.

    ``cascade`` drops what depends on dropped columns. Returns False if existing rows prevent the primary key.
    """
    if any(change.kind == "table" for change in changes):
        conn.execute(_build_table(layout))
        roles.grant_view_rights(conn, [layout.name])
        has_key = True
    else:
        _change_columns(conn, layout, changes, cascade=cascade)
        has_key = _create_primary_key(conn, layout)
    indexes = _build_indexes(layout, find_indexed_columns(conn, layout), key_index=not has_key)
    conn.execute(sql.SQL("; ").join([*indexes, *_build_comments(layout)]))
    return has_key


def _build_table(layout: TableLayout) -> sql.Composed:
    """Return the statement that creates a table with its primary key."""
    parts = [*map(_build_column_definition, list_columns(layout))]
    if layout.identity:
        parts.append(sql.SQL("PRIMARY KEY ({})").format(_build_primary_key(layout)))
    return sql.SQL("CREATE TABLE {} ({})").format(sql.Identifier(SCHEMA, layout.name), sql.SQL(", ").join(parts))


def _build_primary_key(layout: TableLayout) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, (*layout.identity, SOURCE_COLUMN)))


def _change_columns(conn: Connection, layout: TableLayout, changes: Sequence[Drift], *, cascade: bool) -> None:
    """Drop, add and rename the columns of a table."""
    table = sql.Identifier(SCHEMA, layout.name)
    columns = {column.name: column for column in list_columns(layout)}
    if layout.key != KEY_COLUMN and {change.name for change in changes} >= {KEY_COLUMN, layout.key}:
        # The view has a column of its own with the key now.
        conn.execute(
            sql.SQL("ALTER TABLE {} RENAME COLUMN {} TO {}").format(
                table, sql.Identifier(KEY_COLUMN), sql.Identifier(layout.key)
            )
        )
        changes = [change for change in changes if change.name not in (KEY_COLUMN, layout.key)]
    for change in changes:
        if change.kind != "column":
            continue
        name = sql.Identifier(change.name)
        if change.actual is not None:
            drop = "ALTER TABLE {} DROP COLUMN {} CASCADE" if cascade else "ALTER TABLE {} DROP COLUMN {}"
            conn.execute(sql.SQL(drop).format(table, name))
        if change.expected is not None:
            # Existing rows have no value yet.
            column = replace(columns[change.name], required=change.name in DEFAULTS)
            conn.execute(sql.SQL("ALTER TABLE {} ADD COLUMN {}").format(table, _build_column_definition(column)))


def _create_primary_key(conn: Connection, layout: TableLayout) -> bool:
    """Create the primary key of a table. Return False if earlier rows lack values of its columns."""
    if not layout.identity or has_primary_key(conn, layout):
        return True
    table = sql.Identifier(SCHEMA, layout.name)
    try:
        with conn.transaction():
            conn.execute(sql.SQL("ALTER TABLE {} ADD PRIMARY KEY ({})").format(table, _build_primary_key(layout)))
    except (psycopg.errors.NotNullViolation, psycopg.errors.UniqueViolation):
        return False
    _drop_replaced_indexes(conn, layout)
    return True


def _build_indexes(layout: TableLayout, indexed: Collection[str], *, key_index: bool) -> list[sql.Composed]:
    """Return the statements for the indexes on other columns than ``indexed``, and on the key with ``key_index``.

    An index leaves out rows without a value.
    """
    table = sql.Identifier(SCHEMA, layout.name)
    columns = [replace(c, index="btree") if key_index and c.name == layout.key else c for c in layout.columns]
    return [
        sql.SQL("CREATE INDEX ON {table} USING {method} ({column}) {where}").format(
            table=table,
            method=sql.Identifier(column.index),
            column=sql.Identifier(column.name),
            where=sql.SQL("" if column.required else "WHERE {} IS NOT NULL").format(sql.Identifier(column.name)),
        )
        for column in columns
        if column.index and column.name not in indexed
    ]


def _build_comments(layout: TableLayout) -> list[sql.Composed]:
    table = sql.Identifier(SCHEMA, layout.name)
    return [
        sql.SQL("COMMENT ON TABLE {} IS {}").format(table, sql.Literal(layout.description)),
        *(
            sql.SQL("COMMENT ON COLUMN {} IS {}").format(
                sql.Identifier(SCHEMA, layout.name, column.name), sql.Literal(column.description)
            )
            for column in list_columns(layout)
        ),
    ]


def _build_column_definition(column: TableColumn) -> sql.Composed:
    return sql.SQL("{} {} {} {}").format(
        sql.Identifier(column.name),
        sql.SQL(column.type),
        sql.SQL("NOT NULL" if column.required else ""),
        sql.SQL(f"DEFAULT {default}" if (default := _find_default(column)) else ""),
    )


def _drop_replaced_indexes(conn: Connection, layout: TableLayout) -> None:
    """Drop the indexes on the key alone, which tables of earlier versions have and the primary key replaces."""
    indexes = conn.execute(
        """
        SELECT i.indexrelid::regclass::text
        FROM pg_index i
        JOIN pg_class c ON c.oid = i.indrelid
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
        WHERE c.relnamespace = %s::regnamespace
            AND c.relname = %s
            AND a.attname = %s
            AND i.indnatts = 1
            AND NOT i.indisunique
        """,
        [SCHEMA, layout.name, layout.key],
    ).fetchall()
    for (name,) in indexes:
        conn.execute(sql.SQL("DROP INDEX {}").format(sql.SQL(name)))


def _find_default(column: TableColumn) -> LiteralString | None:
    """Return the default of a column that no load writes, or None for a column of the view."""
    return DEFAULTS.get(column.name) if column.required else None
