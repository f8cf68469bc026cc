"""The rights in the database: three group roles, each with the rights that its work needs.

``fhir_reader`` reads the tables of views, but neither ``ops`` nor ``fhir.resource``. ``fhir_operator`` manages runs and
dead letters, and has no right to schema ``fhir``. ``fhir_loader`` loads data: it may add to the audit log, but not
change it, and may not migrate. Migrations and key rotations are run by the owner of the schemas.
"""

from collections.abc import Iterable, Sequence

from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import Connection

READER, OPERATOR, LOADER = "fhir_reader", "fhir_operator", "fhir_loader"
ROLES = (READER, OPERATOR, LOADER)

_LOADS = "SELECT, INSERT, UPDATE, DELETE"
_LOADER = {
    "alembic_version": "SELECT",
    "audit_log": "SELECT, INSERT",
    "audit_head": "SELECT, UPDATE",
    "encryption": "SELECT, INSERT",
    "key_rotations": "SELECT",
}
"""Tables of ``ops`` on which the loader has fewer rights than ``_LOADS``."""

_OPERATOR = {
    "audit_log": "SELECT, INSERT",
    "audit_head": "SELECT, UPDATE",
    "dead_letters": "SELECT, INSERT, UPDATE",
    "corrections": "SELECT, INSERT, UPDATE",
    "received": "SELECT, INSERT, UPDATE",
    "incidents": "SELECT, UPDATE",
    "withheld": "",
    "consent_records": "",
    "idempotency": "",
}
"""Tables of ``ops`` on which the operator has other rights than SELECT."""


def list_missing_roles(conn: Connection) -> list[str]:
    """Return the roles that do not exist, because the migrating user may not create roles."""
    return [name for name in ROLES if name not in _present(conn)]


def grant_rights(conn: Connection) -> None:
    """Grant each existing role its rights on all existing tables, and revoke others.

    Run by the owner of the schemas.
    """
    present = _present(conn)
    ops = _relations(conn, "ops")
    resources = [name for name in _relations(conn, "fhir") if name == "resource" or name.startswith("resource_")]
    if READER in present:
        _execute(conn, "GRANT USAGE ON SCHEMA fhir TO {}", sql.Identifier(READER))
    if OPERATOR in present:
        _execute(conn, "GRANT USAGE ON SCHEMA ops TO {}", sql.Identifier(OPERATOR))
        _set(conn, OPERATOR, "ops", {name: _OPERATOR.get(name, "SELECT") for name in ops})
    if LOADER in present:
        _execute(conn, "GRANT USAGE ON SCHEMA ops TO {}", sql.Identifier(LOADER))
        _execute(conn, "GRANT USAGE, CREATE ON SCHEMA fhir TO {}", sql.Identifier(LOADER))
        _set(conn, LOADER, "ops", {name: _LOADER.get(name, _LOADS) for name in ops})
        _set(conn, LOADER, "fhir", dict.fromkeys(resources, _LOADS))
    tables = conn.execute("SELECT name FROM ops.view_tables WHERE to_regclass(format('fhir.%I', name)) IS NOT NULL")
    ours = _ours(conn, "fhir")
    grant_view_rights(conn, [name for (name,) in tables if name in ours])


def grant_view_rights(conn: Connection, tables: Iterable[str]) -> None:
    """Grant readers and loaders their rights on tables of views. Run by the owner of the tables."""
    present = _present(conn)
    for name in tables:
        table = sql.Identifier("fhir", name)
        if READER in present:
            _execute(conn, "GRANT SELECT ON {} TO {}", table, sql.Identifier(READER))
        if LOADER in present:
            _execute(conn, f"GRANT {_LOADS} ON {{}} TO {{}}", table, sql.Identifier(LOADER))
            # A table that the role owns can be altered by every loader when its view gets another column.
            if _may_transfer_ownership(conn):
                _execute(conn, "ALTER TABLE {} OWNER TO {}", table, sql.Identifier(LOADER))


def _set(conn: Connection, role: str, schema: str, rights: dict[str, str]) -> None:
    for name, granted in rights.items():
        table = sql.Identifier(schema, name)
        _execute(conn, "REVOKE ALL ON {} FROM {}", table, sql.Identifier(role))
        if granted:
            _execute(conn, f"GRANT {granted} ON {{}} TO {{}}", table, sql.Identifier(role))


def _execute(conn: Connection, statement: str, *names: sql.Composable) -> None:
    conn.execute(sql.SQL(statement).format(*names))


def _present(conn: Connection) -> frozenset[str]:
    rows = conn.execute("SELECT rolname FROM pg_roles WHERE rolname = ANY(%s)", [list(ROLES)])
    return frozenset(name for (name,) in rows)


def _relations(conn: Connection, schema: str) -> Sequence[str]:
    rows = conn.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace AND relkind IN ('r', 'p', 'v') ORDER BY 1",
        [schema],
    )
    return [name for (name,) in rows]


def _ours(conn: Connection, schema: str) -> frozenset[str]:
    """Return the tables that the current user may grant rights on."""
    rows = conn.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace AND pg_has_role(relowner, 'USAGE')",
        [schema],
    )
    return frozenset(name for (name,) in rows)


def _may_transfer_ownership(conn: Connection) -> bool:
    kind = "SET" if conn.info.server_version >= 160_000 else "MEMBER"
    row = conn.execute("SELECT pg_has_role(%s, %s)", [LOADER, kind]).fetchone()
    return bool(row and row[0])
