"""The tables of the views in schema ``fhir``: creates and extends them, and compares them with their views.

The module ``layout`` defines the columns of the tables, ``table_differences`` compares them with existing tables, and
``table_definitions`` has the statements that create and change tables.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psycopg
from psycopg import sql

from fhir_assets.errors import ConfigurationError, Overtaken, ViewError
from fhir_assets.fhir.views import View
from fhir_assets.warehouse.ops.checkpoints import remove_loaded_parts
from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of
from fhir_assets.warehouse.postgres.db.schema_state import lock_schema
from fhir_assets.warehouse.postgres.tables import marts
from fhir_assets.warehouse.postgres.tables.layout import TableLayout, build_layout, column_type
from fhir_assets.warehouse.postgres.tables.row_streams import join_resources
from fhir_assets.warehouse.postgres.tables.table_definitions import apply_layout
from fhir_assets.warehouse.postgres.tables.table_differences import SCHEMA, Drift, compare

__all__ = [
    "Drift",
    "NewWindow",
    "TableChanges",
    "apply_changes",
    "build_layout",
    "column_type",
    "count_rows",
    "count_rows_by_window",
    "ensure_tables",
    "find_drift",
    "find_existing_tables",
    "find_outdated_types",
    "mark_up_to_date",
    "refresh_marts",
]

_MAX_EXACT_COUNT = 1_000_000


@dataclass(frozen=True, slots=True)
class TableChanges:
    """The changes that were made: the removed differences, and the resource types whose rows are now outdated."""

    differences: Sequence[Drift] = ()
    outdated_types: Sequence[str] = ()


def ensure_tables(conn: Session, views: Iterable[View]) -> TableChanges:
    """Create missing tables, columns, indexes and comments. Executes one cheap query if nothing is missing.

    If the expressions or columns of a view changed, the rows of its table are outdated: the parts of its resource type
    are removed from ``ops.loaded_parts``, so that the next load writes the rows again. A changed comment or index
    leaves the rows valid. The changes are committed if ``conn`` is not in a transaction. Several processes may call
    this function at the same time.

    Raises ViewError, without any change, if a column has another type than in the view or is not in the view, or if
    another relation depends on a column that must be dropped. Raises ConfigurationError if the user of DB_URL lacks the
    rights.
    """
    return _update_tables(conn, _build_layouts(conn, views))


def apply_changes(conn: Session, views: Iterable[View], *, cascade: bool = False) -> TableChanges:
    """Apply all changes of the views, including those that lose data.

    Columns that are not in a view are dropped. Columns of another type are dropped and created again; they are empty
    until the windows are loaded again. With ``cascade``, the SQL views and other relations that depend on a dropped
    column are dropped, too. See ``ensure_tables`` for all other changes.
    """
    return _update_tables(conn, _build_layouts(conn, views), drop_columns=True, cascade=cascade)


def refresh_marts(conn: Session, *, retry_refused: bool = False) -> dict[str, str]:
    """Create the marts that are missing or whose definition changed. Commits if ``conn`` is not in a transaction.

    With ``retry_refused``, also try those again that could not be created. Return the marts that could not be created,
    each with the reason. Wait for loads only if a mart must be created.
    """
    with conn.transaction():
        if marts.find_outdated(conn, retry_refused=retry_refused):
            lock_schema(conn)
            marts.refresh(conn, retry_refused=retry_refused)
        return marts.find_refused(conn)


def find_outdated_types(conn: Connection) -> list[str]:
    """Return the resource types whose tables were changed and whose rows were not all written again."""
    rows = conn.execute("SELECT DISTINCT resource_type FROM ops.view_tables WHERE outdated ORDER BY 1")
    return [resource_type for (resource_type,) in rows]


def mark_up_to_date(conn: Connection, resource_type: str) -> None:
    """Record that all rows of a resource type were written after its tables were changed."""
    conn.execute("UPDATE ops.view_tables SET outdated = false WHERE resource_type = %s AND outdated", [resource_type])


def _mark_outdated(conn: Connection, resource_types: Collection[str]) -> None:
    """Record that the rows of resource types have to be written again, of those types that have any."""
    conn.execute(
        """
        UPDATE ops.view_tables v
        SET outdated = true
        WHERE v.resource_type = ANY(%s)
            AND EXISTS (
                SELECT FROM fhir.resource r
                WHERE r.resource_type = v.resource_type
            )
        """,
        [list(resource_types)],
    )


def read_layouts(conn: Connection, resource_type: str) -> dict[str, str]:
    """Return the layouts of the tables of a resource type, by the name of the view."""
    rows = conn.execute("SELECT name, layout FROM ops.view_tables WHERE resource_type = %s", [resource_type])
    return dict(rows.fetchall())


def hold_layouts(conn: Connection, resource_type: str, layouts: Mapping[str, str]) -> None:
    """Prevent changes of the tables of a resource type until the transaction ends.

    New tables have to wait for the transaction: otherwise a load would record parts as loaded although the new table
    lacks their rows. Raises Overtaken if the layouts are no longer ``layouts``, because the views were changed since
    they were read.
    """
    conn.execute("SELECT pg_advisory_xact_lock_shared(%s)", [advisory_locks.SCHEMA])
    if read_layouts(conn, resource_type) != layouts:
        raise Overtaken(f"the views of {resource_type} were changed during the load: start this run again")


def count_rows(conn: Connection, views: Sequence[View]) -> dict[str, int]:
    """Return the number of rows in the table of each view, by the name of the view.

    It is exact up to a million rows, otherwise Postgres's estimate.
    """
    estimates = conn.execute(
        """
        SELECT relname, reltuples::bigint
        FROM pg_class
        WHERE relnamespace = 'fhir'::regnamespace AND relname = ANY(%s)
        """,
        [[view.name for view in views]],
    )
    counts: dict[str, int] = dict(estimates.fetchall())
    exact = [
        sql.SQL("SELECT {}, count(*) FROM {}").format(sql.Literal(view.name), sql.Identifier(SCHEMA, view.name))
        for view in views
        if counts.get(view.name, 0) <= _MAX_EXACT_COUNT
    ]
    if exact:
        counts.update(conn.execute(sql.SQL(" UNION ALL ").join(exact)).fetchall())
    return counts


class NewWindow(NamedTuple):
    """What a load wrote of a window, if it replaced no stored resource: its resources, and their rows by view."""

    resources: int
    rows: Mapping[str, int]


def count_rows_by_window(
    conn: Session,
    views: Sequence[View],
    resource_type: str,
    partition_keys: Sequence[str],
    new_windows: Mapping[str, NewWindow] | None = None,
) -> dict[str, Counter[str]]:
    """Return the numbers of rows by view and by window of their resources. Windows without resources are left out.

    The rows of a window are not counted if the last load wrote all of its resources, as ``new_windows`` says.
    """
    stored = conn.execute(
        """
        SELECT partition_key, count(*)
        FROM fhir.resource
        WHERE source = ops.current_source()
            AND resource_type = %s
            AND partition_key = ANY(%s)
            AND resource IS NOT NULL
        GROUP BY partition_key
        """,
        [resource_type, list(partition_keys)],
    )
    counts: dict[str, Counter[str]] = {view.name: Counter() for view in views}
    to_count = []
    for key, resources in stored:
        new = (new_windows or {}).get(key)
        if new is None or new.resources != resources:
            to_count.append(key)
            continue
        for view in views:
            if rows := new.rows.get(view.name):
                counts[view.name][key] = rows
    params = {"type": resource_type, "keys": to_count}
    for layout in _build_layouts(conn, views) if params["keys"] else ():
        query = sql.SQL("SELECT r.partition_key, count(*) {} AND r.partition_key = ANY(%(keys)s) GROUP BY 1").format(
            join_resources(layout)
        )
        counts[layout.name].update(dict(conn.execute(query, params).fetchall()))
    return counts


def find_existing_tables(conn: Connection, views: Sequence[View]) -> frozenset[str]:
    """Return the names of the views whose table exists."""
    rows = conn.execute(
        """
        SELECT relname
        FROM pg_class
        WHERE relnamespace = 'fhir'::regnamespace
            AND relname = ANY(%s)
            AND relkind = 'r'
        """,
        [[view.name for view in views]],
    )
    return frozenset(name for (name,) in rows)


def find_drift(conn: Session, view: View) -> list[Drift]:
    """Return the differences between a table and its view; an empty list if there are none."""
    return compare(conn, *_build_layouts(conn, [view]))


def _build_layouts(conn: Session, views: Iterable[View]) -> list[TableLayout]:
    return [build_layout(view, encrypted=cipher_of(conn).encrypts) for view in views]


def _update_tables(
    conn: Session, layouts: Sequence[TableLayout], *, drop_columns: bool = False, cascade: bool = False
) -> TableChanges:
    changes: list[Drift] = []
    with conn.transaction():
        if not _find_changed(conn, layouts):
            return TableChanges()
        lock_schema(conn)
        outdated_types: set[str] = set()
        for layout, applied in _find_changed(conn, layouts):
            changes += (differences := compare(conn, layout))
            if _read_fingerprint(applied) != layout.fingerprint or not all(
                difference.leaves_rows_valid for difference in differences
            ):
                outdated_types.add(layout.resource_type)
            lossy = [difference for difference in differences if not difference.safe]
            if lossy and not drop_columns:
                raise ViewError(
                    f"table {SCHEMA}.{layout.name} differs from its view: {'; '.join(map(str, lossy))}. "
                    "Run `fhir-assets migrate --apply-view-changes`, which drops these columns and fills those of the "
                    "view from fhir.resource"
                    + (
                        ", then `fhir-assets keys rotate`, which encrypts what was stored before keys were set"
                        if cipher_of(conn).encrypts
                        else ""
                    )
                )
            try:
                if any(difference.kind == "column" and difference.actual for difference in differences):
                    marts.drop_marts_of(conn, layout.name, cascade=cascade)
                complete = apply_layout(conn, layout, differences, cascade=cascade)
                _record_layout(conn, layout, complete=complete)
            except psycopg.errors.DependentObjectsStillExist as error:
                raise ViewError(_describe_dependents(layout, error)) from None
            except psycopg.errors.InsufficientPrivilege:
                raise ConfigurationError(
                    f"The login {conn.info.user} of DB_URL may not create or change table {SCHEMA}.{layout.name}: "
                    "run `fhir-assets migrate` as the user that owns the schema, or grant it fhir_loader"
                ) from None
            except (psycopg.ProgrammingError, psycopg.DataError, psycopg.errors.ProgramLimitExceeded) as error:
                raise ViewError(_describe_refusal(layout, error)) from None
        for resource_type in sorted(outdated_types):
            remove_loaded_parts(conn, resource_type)
        _mark_outdated(conn, outdated_types)
        marts.refresh(conn, {change.view for change in changes if change.kind == "column"})
    return TableChanges(changes, sorted(outdated_types))


def _find_changed(conn: Connection, layouts: Sequence[TableLayout]) -> list[tuple[TableLayout, str | None]]:
    """Return the layouts that differ from the last applied layout, with the stamp of that layout or None."""
    names = [layout.name for layout in layouts]
    applied: dict[str, str] = dict(
        conn.execute(
            """
            SELECT v.name, v.layout
            FROM ops.view_tables v
            WHERE v.name = ANY(%s)
                AND EXISTS (
                    SELECT FROM pg_class c
                    WHERE c.relnamespace = 'fhir'::regnamespace
                        AND c.relname = v.name
                        AND c.relkind = 'r'
                )
            """,
            [names],
        ).fetchall()
    )
    return [(layout, applied.get(layout.name)) for layout in layouts if applied.get(layout.name) != _stamp(layout)]


def _describe_dependents(layout: TableLayout, error: psycopg.Error) -> str:
    """Return which relations prevent dropping a column.

    The detail of the error names relations and contains no data.
    """
    dependents = "; ".join((error.diag.message_detail or "another relation depends on it").splitlines())
    return (
        f"view {layout.name}: a column of table {SCHEMA}.{layout.name} cannot be dropped: {dependents}. Change or drop "
        "what depends on it and create it again afterwards, keep the column in the ViewDefinition, or run "
        "`fhir-assets migrate --apply-view-changes --cascade`, which drops what depends on it"
    )


def _describe_refusal(layout: TableLayout, error: psycopg.Error) -> str:
    """Return why Postgres refuses the table of a view.

    Its message names relations, columns and types, and contains no data.
    """
    reason = error.diag.message_primary or type(error).__name__
    return (
        f"view {layout.name}: Postgres refuses its table {SCHEMA}.{layout.name}: {reason} (SQLSTATE {error.sqlstate}). "
        "Correct the ViewDefinition, or rename the view or the column"
    )


def _stamp(layout: TableLayout, *, complete: bool = True) -> str:
    """Return the stamp of a layout.

    A table that lacks its primary key has another stamp, so that the next call tries to create the key.
    """
    return f"{layout.shape}{'' if complete else '!'}:{layout.fingerprint}"


def _read_fingerprint(stamp: str | None) -> str | None:
    return None if stamp is None else stamp.partition(":")[2]


def _record_layout(conn: Connection, layout: TableLayout, *, complete: bool) -> None:
    conn.execute(
        """
        INSERT INTO ops.view_tables (name, resource_type, layout, key_column)
        VALUES (%s, %s, %s, %s)
        ON CONFLICT (name) DO UPDATE SET
            resource_type = excluded.resource_type,
            layout = excluded.layout,
            key_column = excluded.key_column,
            applied_at = now()
        """,
        [layout.name, layout.resource_type, _stamp(layout, complete=complete), layout.key],
    )
