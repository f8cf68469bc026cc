"""Foreign keys between the tables of views, which tools read to draw the diagram and to propose joins.

They are declared as NOT ENFORCED: the target of a reference may lack (it is not loaded yet, withheld, or nowhere), and
an enforced key would refuse the row. Postgres 18 is the first that has such keys; a key that is only NOT VALID is still
checked for new rows.
"""

from collections.abc import Sequence

from psycopg import sql

from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.views import View
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of
from fhir_assets.warehouse.postgres.db.schema_state import lock_schema
from fhir_assets.warehouse.postgres.tables.layout import SOURCE_COLUMN, TableLayout, build_layout, find_targets
from fhir_assets.warehouse.postgres.tables.table_differences import SCHEMA, has_primary_key
from fhir_assets.warehouse.postgres.tables.view_tables import find_existing_tables

_PREFIX = "fhir_assets_"
_MIN_VERSION = 180_000
_MAX_NAME_BYTES = 63

_Key = tuple[str, str]
"""A table and the name of its foreign key."""


def apply(conn: Session, views: Sequence[View], *, wanted: bool) -> int:
    """Create the foreign keys of the tables of ``views``, or drop them unless they are ``wanted``. Return their number.

    Keys of other people are left alone. Raises ConfigurationError if the server cannot have keys that are not enforced.
    """
    if wanted and conn.info.server_version < _MIN_VERSION:
        raise ConfigurationError(
            f"FHIR_FOREIGN_KEYS needs Postgres 18, and this is {conn.info.server_version // 10_000}: earlier versions "
            "would refuse every row whose target is not in the tables. Unset it, or upgrade Postgres"
        )
    with conn.transaction():
        if not wanted and not _list_existing(conn):
            return 0
        lock_schema(conn)
        existing = _list_existing(conn)
        keys = _build_keys(conn, views) if wanted else {}
        for table, name in sorted(existing - set(keys)):
            conn.execute(
                sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(sql.Identifier(SCHEMA, table), sql.Identifier(name))
            )
        for key in sorted(set(keys) - existing):
            conn.execute(keys[key])
    return len(keys)


def _list_existing(conn: Connection) -> set[_Key]:
    rows = conn.execute(
        """
        SELECT c.relname, k.conname
        FROM pg_constraint k
        JOIN pg_class c ON c.oid = k.conrelid
        WHERE c.relnamespace = %s::regnamespace
            AND k.contype = 'f'
            AND starts_with(k.conname, %s)
        """,
        [SCHEMA, _PREFIX],
    )
    return set(rows.fetchall())


def _build_keys(conn: Session, views: Sequence[View]) -> dict[_Key, sql.Composed]:
    """Return the statement that creates each foreign key whose tables exist and whose target has its primary key."""
    existing = find_existing_tables(conn, views)
    views = [view for view in views if view.name in existing]
    layouts = {view.name: build_layout(view, encrypted=cipher_of(conn).encrypts) for view in views}
    targets = {name for name, layout in layouts.items() if layout.identity == ("id",) and has_primary_key(conn, layout)}
    keys = {}
    for view in views:
        layout = layouts[view.name]
        types = {column.name: column.type for column in layout.columns}
        for column, target in find_targets(view, layout.key).items():
            if target in targets and types[column] == "text":
                keys[layout.name, _build_name(column)] = _build_statement(layout, column, target)
    return keys


def _build_name(column: str) -> str:
    return f"{_PREFIX}{column}".encode()[:_MAX_NAME_BYTES].decode(errors="ignore")


def _build_statement(layout: TableLayout, column: str, target: str) -> sql.Composed:
    return sql.SQL("""
        ALTER TABLE {table}
        ADD CONSTRAINT {name} FOREIGN KEY ({column}, {source})
        REFERENCES {target} (id, {source}) NOT ENFORCED
    """).format(
        table=sql.Identifier(SCHEMA, layout.name),
        name=sql.Identifier(_build_name(column)),
        column=sql.Identifier(column),
        source=sql.Identifier(SOURCE_COLUMN),
        target=sql.Identifier(SCHEMA, target),
    )
