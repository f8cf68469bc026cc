"""Rights in the database: three group roles, each with the rights that its members need.

``fhir_reader`` reads the tables of views, the marts and ``fhir.deleted``, but neither ``ops`` nor ``fhir.resource``.
``fhir_operator`` manages runs and dead letters, and has no right to schema ``fhir``. ``fhir_loader`` loads data. It may
add to the audit log, but not change it, and may not migrate. The owner of the schemas runs migrations and rotates keys.
"""

from collections.abc import Iterable, Sequence

import psycopg
from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.db.resource_partitions import SCHEMA as PARTITIONS
from fhir_assets.warehouse.postgres.db.schema_state import sql_folder

READER, OPERATOR, LOADER = "fhir_reader", "fhir_operator", "fhir_loader"
ROLES = (READER, OPERATOR, LOADER)

_LOAD_RIGHTS = "SELECT, INSERT, UPDATE, DELETE"
_LOADER_EXCEPTIONS = {
    "alembic_version": "SELECT",
    "audit_log": "SELECT",
    "audit_head": "SELECT",
    "encryption": "SELECT, INSERT",
    "key_rotations": "SELECT",
}
"""The loader's rights on tables of ``ops`` where it has fewer than ``_LOAD_RIGHTS``."""

_OPERATOR_RIGHTS = {
    "audit_log": "SELECT",
    "audit_head": "SELECT",
    "dead_letters": "SELECT, INSERT, UPDATE",
    "corrections": "SELECT, INSERT, UPDATE",
    "received": "SELECT, INSERT, UPDATE",
    "incidents": "SELECT, UPDATE",
    "window_verdicts": "SELECT, INSERT, UPDATE",
    "withheld": "",
    "consent_records": "",
    "idempotency": "",
    "numbers": "",
    "posted_resources": "",
}
"""The operator's rights on tables of ``ops`` where they differ from SELECT."""


def list_missing_roles(conn: Connection) -> list[str]:
    """Return the roles that do not exist. They are missing if the migrating user may not create roles."""
    return [name for name in ROLES if name not in _list_roles(conn)]


def take_reader_role(conn: Connection) -> bool:
    """Give the session the rights of ``fhir_reader`` only. Return False, and change nothing, if its login may not.

    No transaction may be open.
    """
    try:
        _execute(conn, "SET ROLE {}", sql.Identifier(READER))
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.InvalidParameterValue):
        conn.rollback()
        return False
    conn.commit()
    return True


def describe_reader(conn: Connection) -> str:
    """Return with which rights a session of ``take_reader_role`` reads, to follow "reads"."""
    row = conn.execute("SELECT current_user").fetchone()
    if row == (READER,):
        return f"as {READER}, which may read tables only"
    return f"with the rights of the login of DB_URL, which is no member of {READER}"


def grant_rights(conn: Connection) -> None:
    """Grant each existing role its rights on all existing tables, and revoke all other rights.

    Only the owner of the schemas may call this.
    """
    existing = _list_roles(conn)
    ops = _list_relations(conn, "ops")
    if READER in existing:
        _execute(conn, "GRANT USAGE ON SCHEMA fhir TO {}", sql.Identifier(READER))
        _execute(conn, "GRANT SELECT ON fhir.deleted TO {}", sql.Identifier(READER))
        _execute(conn, "GRANT USAGE ON SCHEMA marts TO {}", sql.Identifier(READER))
    if OPERATOR in existing:
        _execute(conn, "GRANT USAGE ON SCHEMA ops TO {}", sql.Identifier(OPERATOR))
        _set_rights(conn, OPERATOR, "ops", {name: _OPERATOR_RIGHTS.get(name, "SELECT") for name in ops})
        _execute(conn, "GRANT USAGE ON SEQUENCE ops.dead_letter_records TO {}", sql.Identifier(OPERATOR))
        _grant_auditing(conn, OPERATOR)
    if LOADER in existing:
        _execute(conn, "GRANT USAGE ON SCHEMA ops TO {}", sql.Identifier(LOADER))
        _execute(conn, "GRANT USAGE, CREATE ON SCHEMA fhir TO {}", sql.Identifier(LOADER))
        _execute(conn, "GRANT USAGE, CREATE ON SCHEMA marts TO {}", sql.Identifier(LOADER))
        _set_rights(conn, LOADER, "ops", {name: _LOADER_EXCEPTIONS.get(name, _LOAD_RIGHTS) for name in ops})
        _execute(conn, "GRANT USAGE ON SEQUENCE ops.dead_letter_records TO {}", sql.Identifier(LOADER))
        _grant_auditing(conn, LOADER)
        _set_rights(conn, LOADER, "fhir", {"resource": _LOAD_RIGHTS})
        _execute(conn, "GRANT USAGE ON SCHEMA {} TO {}", sql.Identifier(PARTITIONS), sql.Identifier(LOADER))
        _set_rights(conn, LOADER, PARTITIONS, dict.fromkeys(_list_relations(conn, PARTITIONS), _LOAD_RIGHTS))
    tables = conn.execute(
        """
        SELECT name
        FROM ops.view_tables
        WHERE to_regclass(format('fhir.%I', name)) IS NOT NULL
        """
    )
    grantable = _list_grantable_tables(conn, "fhir")
    grant_view_rights(conn, [name for (name,) in tables if name in grantable])
    grant_mart_rights(conn, sorted(list_own_marts(conn) & _list_grantable_tables(conn, "marts")))


def grant_view_rights(conn: Connection, tables: Iterable[str]) -> None:
    """Grant readers and loaders their rights on tables of views. Only the owner of the tables may call this."""
    existing = _list_roles(conn)
    transferred = frozenset[str]()
    if LOADER in existing and _may_transfer_ownership(conn):
        transferred = _list_grantable_tables(conn, "fhir", of_others_than=LOADER)
    for name in tables:
        table = sql.Identifier("fhir", name)
        if name in transferred:
            # VACUUM waits for transactions with a GRANT on its table, and ALTER TABLE waits for VACUUM.
            _execute(conn, "LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", table)
        if READER in existing:
            _execute(conn, "GRANT SELECT ON {} TO {}", table, sql.Identifier(READER))
        if LOADER in existing:
            _execute(conn, f"GRANT {_LOAD_RIGHTS} ON {{}} TO {{}}", table, sql.Identifier(LOADER))
        if name in transferred:
            # The role owns the table, so that every loader can alter it when its view gets a new column.
            _execute(conn, "ALTER TABLE {} OWNER TO {}", table, sql.Identifier(LOADER))


def list_own_marts(conn: Connection) -> frozenset[str]:
    """Return the views of schema ``marts`` that fhir_assets created, not those of users.

    The files of ``sql/marts`` name them, and ``ops.marts`` records that they were created: the definition of one that
    could not be created ends with ``!``.
    """
    rows = conn.execute(
        """
        SELECT m.name
        FROM ops.marts m
        JOIN pg_class c ON c.relname = m.name
        WHERE c.relnamespace = 'marts'::regnamespace
            AND c.relkind = 'v'
            AND m.name = ANY(%s)
            AND right(m.definition, 1) <> '!'
        """,
        [[path.stem for path in (sql_folder() / "marts").glob("*.sql")]],
    )
    return frozenset(name for (name,) in rows)


def grant_mart_rights(conn: Connection, marts: Iterable[str]) -> None:
    """Grant readers their right to views of schema ``marts``. Only the owner of the views may call this."""
    existing = _list_roles(conn)
    transferred = frozenset[str]()
    if LOADER in existing and _may_transfer_ownership(conn):
        # Of others only, because ALTER VIEW waits for readers of the view, which may wait for this transaction.
        transferred = _list_grantable_tables(conn, "marts", of_others_than=LOADER)
    for name in marts:
        view = sql.Identifier("marts", name)
        if READER in existing:
            _execute(conn, "GRANT SELECT ON {} TO {}", view, sql.Identifier(READER))
        if name in transferred:
            # The role owns the view, as it owns the tables: every loader can drop it before it changes a table.
            _execute(conn, "ALTER VIEW {} OWNER TO {}", view, sql.Identifier(LOADER))


def _grant_auditing(conn: Connection, role: str) -> None:
    """Let a role append to the audit log, and confirm its mark, by the functions of migration 0044 only."""
    for function in ("lock_audit_head()", "append_audit(timestamptz, jsonb)", "confirm_audit_mark()"):
        _execute(conn, f"GRANT EXECUTE ON FUNCTION ops.{function} TO {{}}", sql.Identifier(role))


def _set_rights(conn: Connection, role: str, schema: str, rights: dict[str, str]) -> None:
    for name, granted in rights.items():
        table = sql.Identifier(schema, name)
        _execute(conn, "REVOKE ALL ON {} FROM {}", table, sql.Identifier(role))
        if granted:
            _execute(conn, f"GRANT {granted} ON {{}} TO {{}}", table, sql.Identifier(role))


def _execute(conn: Connection, statement: str, *names: sql.Composable) -> None:
    conn.execute(sql.SQL(statement).format(*names))


def _list_roles(conn: Connection) -> frozenset[str]:
    rows = conn.execute(
        """
        SELECT rolname
        FROM pg_roles
        WHERE rolname = ANY(%s)
        """,
        [list(ROLES)],
    )
    return frozenset(name for (name,) in rows)


def _list_relations(conn: Connection, schema: str) -> Sequence[str]:
    rows = conn.execute(
        """
        SELECT relname
        FROM pg_class
        WHERE relnamespace = %s::regnamespace
        AND relkind IN ('r', 'p', 'v')
        ORDER BY relname
        """,
        [schema],
    )
    return [name for (name,) in rows]


def _list_grantable_tables(conn: Connection, schema: str, *, of_others_than: str = "") -> frozenset[str]:
    """Return the tables that the current user may grant rights on, without those that a role owns."""
    rows = conn.execute(
        """
        SELECT relname
        FROM pg_class
        WHERE relnamespace = %s::regnamespace
        AND pg_has_role(relowner, 'USAGE')
        AND pg_get_userbyid(relowner) <> %s
        """,
        [schema, of_others_than],
    )
    return frozenset(name for (name,) in rows)


def _may_transfer_ownership(conn: Connection) -> bool:
    kind = "SET" if conn.info.server_version >= 160_000 else "MEMBER"
    row = conn.execute("SELECT pg_has_role(%s, %s)", [LOADER, kind]).fetchone()
    return bool(row and row[0])
