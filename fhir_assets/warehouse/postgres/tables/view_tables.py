"""The tables of the views in schema ``fhir``: made, widened, compared with their views, and changed when asked to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import psycopg
from psycopg import sql

from fhir_assets.errors import ConfigurationError, ViewError
from fhir_assets.fhir.views import View
from fhir_assets.warehouse.ops.checkpoints import remove_loaded_parts
from fhir_assets.warehouse.postgres.db import roles
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of
from fhir_assets.warehouse.postgres.db.migrations import lock_schema
from fhir_assets.warehouse.postgres.tables.layout import KEY_COLUMN, TableColumn, TableLayout, build_layout, column_type

__all__ = [
    "KEY_COLUMN",
    "Drift",
    "apply_changes",
    "build_layout",
    "column_type",
    "count_rows",
    "ensure_tables",
    "find_drift",
]

SCHEMA = "fhir"
_COUNTED = 1_000_000


@dataclass(frozen=True, slots=True)
class Drift:
    """One difference between a table and its view: ``wanted`` and ``found`` are Postgres types, None if absent."""

    view: str
    what: Literal["table", "column", "index"]
    name: str
    wanted: str | None
    found: str | None

    @property
    def safe(self) -> bool:
        """Whether it goes away by adding something, so that nothing is lost."""
        return self.found is None

    def __str__(self) -> str:
        if self.what != "column":
            return f"{self.what} {self.name} is missing"
        if self.wanted is None:
            return f"column {self.name} is in the table but not in the view"
        if self.found is None:
            return f"column {self.name} is in the view but not in the table"
        return f"column {self.name} is {self.found} in the table but {self.wanted} in the view"


def ensure_tables(conn: Session, views: Iterable[View]) -> None:
    """Make what is missing: tables, columns, indexes, comments. One cheap query if there is nothing to do.

    Rows that a changed view makes stale (another expression, another column) are forgotten in ``ops.loaded_parts``, so
    that the next load writes them again; a changed comment or index makes no row stale.
    Committed at once if ``conn`` is outside of a transaction; several processes may do so together.
    Raises ViewError if a column's type changed or a column is gone from the view; nothing is changed then.
    """
    _bring_up(conn, _layouts(conn, views), destroy=False)


def apply_changes(conn: Session, views: Iterable[View]) -> list[Drift]:
    """As ``ensure_tables``, and drops columns that a view lacks and remakes those of another type, empty.

    Returns what was different. The rows fill again as the windows are loaded again.
    """
    return _bring_up(conn, _layouts(conn, views), destroy=True)


def count_rows(conn: Connection, view: View) -> int:
    """How many rows the table of a view has: exact up to a million, beyond that as Postgres last estimated."""
    table = sql.Identifier(SCHEMA, view.name)
    estimate = conn.execute("SELECT reltuples::bigint FROM pg_class WHERE oid = %s::regclass", [table.as_string(conn)])
    found = estimate.fetchone()
    if found is None or found[0] <= _COUNTED:
        found = conn.execute(sql.SQL("SELECT count(*) FROM {}").format(table)).fetchone()
    return int(found[0]) if found else 0


def find_drift(conn: Session, view: View) -> list[Drift]:
    """How the table differs from its view; empty if it fits."""
    return _drift(conn, *_layouts(conn, [view]))


def _layouts(conn: Session, views: Iterable[View]) -> list[TableLayout]:
    return [build_layout(view, encrypted=cipher_of(conn).on) for view in views]


def _bring_up(conn: Session, layouts: Sequence[TableLayout], *, destroy: bool) -> list[Drift]:
    changes: list[Drift] = []
    with conn.transaction():
        if not _unfit(conn, layouts):
            return changes
        lock_schema(conn)
        stale_types: set[str] = set()
        for layout, applied in _unfit(conn, layouts):
            changes += (differences := _drift(conn, layout))
            if _meaning(applied) != layout.fingerprint or any(
                each.what != "index" and each.wanted for each in differences
            ):
                stale_types.add(layout.resource_type)
            lossy = [each for each in differences if not each.safe]
            if lossy and not destroy:
                raise ViewError(
                    f"table {SCHEMA}.{layout.name} no longer fits its view: {'; '.join(map(str, lossy))}. "
                    "Run `fhir-assets migrate --apply-view-changes` (drops the data of these columns), "
                    + (
                        "then `fhir-assets keys rotate`, which fills them from fhir.resource"
                        if cipher_of(conn).on
                        else "then load the windows again"
                    )
                )
            try:
                _apply(conn, layout, differences)
            except psycopg.errors.InsufficientPrivilege:
                raise ConfigurationError(
                    f"The user of DB_URL may not make or change table {SCHEMA}.{layout.name}: "
                    "run `fhir-assets migrate` as the user that owns the schema, or grant it fhir_loader"
                ) from None
        for resource_type in sorted(stale_types):
            remove_loaded_parts(conn, resource_type)
    return changes


def _unfit(conn: Connection, layouts: Sequence[TableLayout]) -> list[tuple[TableLayout, str | None]]:
    """The layouts that differ from those last applied, each with the stamp of the one applied, None if none was."""
    names = [layout.name for layout in layouts]
    applied: dict[str, str] = dict(
        conn.execute(
            "SELECT v.name, v.layout FROM ops.view_tables v WHERE v.name = ANY(%s)"
            " AND EXISTS (SELECT FROM pg_class c WHERE c.relnamespace = 'fhir'::regnamespace AND c.relname = v.name)",
            [names],
        ).fetchall()
    )
    return [(layout, applied.get(layout.name)) for layout in layouts if applied.get(layout.name) != _stamp(layout)]


def _stamp(layout: TableLayout) -> str:
    return f"{layout.shape}:{layout.fingerprint}"


def _meaning(stamp: str | None) -> str | None:
    return None if stamp is None else stamp.partition(":")[2]


def _drift(conn: Connection, layout: TableLayout) -> list[Drift]:
    found: dict[str, str] = dict(
        conn.execute(
            "SELECT a.attname, format_type(a.atttypid, a.atttypmod) FROM pg_attribute a"
            " JOIN pg_class c ON c.oid = a.attrelid"
            " WHERE c.relnamespace = %s::regnamespace AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped",
            [SCHEMA, layout.name],
        ).fetchall()
    )
    if not found:
        return [Drift(layout.name, "table", layout.name, "table", None)]
    wanted = {column.name: column for column in layout.columns}
    changes = [
        Drift(layout.name, "column", name, column.type, found.get(name))
        for name, column in wanted.items()
        if found.get(name) != column.type
    ]
    changes += [Drift(layout.name, "column", name, None, kind) for name, kind in found.items() if name not in wanted]
    indexed = _indexed(conn, layout)
    changes += [
        Drift(layout.name, "index", name, column.index, None)
        for name, column in wanted.items()
        if column.index and name not in indexed
    ]
    return changes


def _indexed(conn: Connection, layout: TableLayout) -> set[str]:
    """The columns that an index begins with."""
    rows = conn.execute(
        "SELECT a.attname FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid"
        " JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]"
        " WHERE c.relnamespace = %s::regnamespace AND c.relname = %s",
        [SCHEMA, layout.name],
    ).fetchall()
    return {row[0] for row in rows}


def _apply(conn: Connection, layout: TableLayout, changes: Sequence[Drift]) -> None:
    table = sql.Identifier(SCHEMA, layout.name)
    columns = {column.name: column for column in layout.columns}
    if any(change.what == "table" for change in changes):
        conn.execute(
            sql.SQL("CREATE TABLE {} ({})").format(table, sql.SQL(", ").join(map(_definition, layout.columns)))
        )
        roles.cover(conn, [layout.name])
    for change in changes:
        if change.what != "column":
            continue
        name = sql.Identifier(change.name)
        if change.found is not None:
            conn.execute(sql.SQL("ALTER TABLE {} DROP COLUMN {}").format(table, name))
        if change.wanted is not None:
            conn.execute(sql.SQL("ALTER TABLE {} ADD COLUMN {}").format(table, _definition(columns[change.name])))
    indexed = _indexed(conn, layout)
    for column in layout.columns:
        if column.index and column.name not in indexed:
            conn.execute(
                sql.SQL("CREATE INDEX ON {} USING {} ({})").format(
                    table, sql.Identifier(column.index), sql.Identifier(column.name)
                )
            )
    conn.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(table, sql.Literal(layout.description)))
    for column in layout.columns:
        conn.execute(
            sql.SQL("COMMENT ON COLUMN {} IS {}").format(
                sql.Identifier(SCHEMA, layout.name, column.name), sql.Literal(column.description)
            )
        )
    conn.execute(
        "INSERT INTO ops.view_tables (name, resource_type, layout) VALUES (%s, %s, %s)"
        " ON CONFLICT (name) DO UPDATE SET resource_type = excluded.resource_type, layout = excluded.layout,"
        " applied_at = now()",
        [layout.name, layout.resource_type, _stamp(layout)],
    )


def _definition(column: TableColumn) -> sql.Composed:
    return sql.SQL("{} {} {}").format(
        sql.Identifier(column.name),
        sql.SQL(column.type),
        sql.SQL("NOT NULL" if column.required else ""),
    )
