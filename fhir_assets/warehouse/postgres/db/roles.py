"""Rights in the database: a group role for each kind of process or person, with the rights that its members need.

``role_rights`` lists them. The owner of the schemas creates the roles, grants the rights, runs migrations and rotates
keys. Roles belong to the server: a database that is restored into another server has its rights again after
`fhir-assets roles`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import psycopg
from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.db.resource_partitions import SCHEMA as PARTITIONS
from fhir_assets.warehouse.postgres.db.role_rights import (
    API,
    APPENDS_TO_AUDIT_LOG,
    AUDIT_FUNCTIONS,
    CONNECTOR,
    DAGSTER,
    LOAD_RIGHTS,
    LOADER,
    OPERATOR,
    READER,
    ROLES,
    find_ops_rights,
    uses_ops,
)
from fhir_assets.warehouse.postgres.db.schema_state import sql_folder


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


def create_missing_roles(conn: Connection) -> list[str]:
    """Create the roles that do not exist, and return those that the user of the session may not create."""
    refused = []
    for name in list_missing_roles(conn):
        try:
            with conn.transaction():
                _execute(conn, "CREATE ROLE {} NOLOGIN", sql.Identifier(name))
        except (psycopg.errors.DuplicateObject, psycopg.errors.UniqueViolation):
            continue  # by another process, for another database of the server
        except psycopg.errors.InsufficientPrivilege:
            refused.append(name)
    return refused


def grant_rights(conn: Connection) -> None:
    """Grant each existing role its rights on all existing tables, and revoke all other rights.

    Roles that are missing are created if the user may. Only the owner of the schemas may call this.
    """
    create_missing_roles(conn)
    existing = _list_roles(conn)
    ops = _list_relations(conn, "ops")
    for function in AUDIT_FUNCTIONS:
        # A restore without rights leaves functions to everybody.
        conn.execute(f"REVOKE EXECUTE ON FUNCTION ops.{function} FROM PUBLIC".encode())
    if READER in existing:
        _set_rights(conn, READER, "ops", dict.fromkeys(ops, ""))
        _grant(conn, READER, "USAGE ON SCHEMA fhir", "SELECT ON fhir.deleted", "USAGE ON SCHEMA marts")
    for role in filter(uses_ops, sorted(existing)):
        _grant(conn, role, "USAGE ON SCHEMA ops")
        _set_rights(conn, role, "ops", {name: find_ops_rights(role, name) for name in ops})
        if role in (LOADER, OPERATOR, API):
            _grant(conn, role, "USAGE ON SEQUENCE ops.dead_letter_records")
        if role in APPENDS_TO_AUDIT_LOG:
            _grant(conn, role, *(f"EXECUTE ON FUNCTION ops.{function}" for function in AUDIT_FUNCTIONS))
    if LOADER in existing:
        _grant(conn, LOADER, "USAGE, CREATE ON SCHEMA fhir", "USAGE, CREATE ON SCHEMA marts")
    if API in existing:
        _grant(conn, API, "USAGE ON SCHEMA fhir", "USAGE ON SCHEMA marts", "SELECT ON fhir.deleted")
    for role in (LOADER, API):
        if role in existing:
            _set_rights(conn, role, "fhir", {"resource": LOAD_RIGHTS})
            _execute(conn, "GRANT USAGE ON SCHEMA {} TO {}", sql.Identifier(PARTITIONS), sql.Identifier(role))
            _set_rights(conn, role, PARTITIONS, dict.fromkeys(_list_relations(conn, PARTITIONS), LOAD_RIGHTS))
    grant_outbox_rights(conn)
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
        for role in (LOADER, API):
            if role in existing:
                _execute(conn, f"GRANT {LOAD_RIGHTS} ON {{}} TO {{}}", table, sql.Identifier(role))
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
        for role in (READER, API):
            if role in existing:
                _execute(conn, "GRANT SELECT ON {} TO {}", view, sql.Identifier(role))
        if name in transferred:
            # The role owns the view, as it owns the tables: every loader can drop it before it changes a table.
            _execute(conn, "ALTER VIEW {} OWNER TO {}", view, sql.Identifier(LOADER))


def grant_outbox_rights(conn: Connection) -> None:
    """Let the connector read the tables of schema ``health`` and write its own, if `connector install` made them.

    Loaders and operators, who report how far deliveries are, read its events without identifiers of patients.
    """
    if not _has_schema(conn, "health"):
        return
    existing = _list_roles(conn)
    tables = _list_relations(conn, "health")
    if CONNECTOR in existing:
        _grant(conn, CONNECTOR, "USAGE ON SCHEMA health", "USAGE ON ALL SEQUENCES IN SCHEMA health")
        rights = {name: LOAD_RIGHTS if name.startswith("fhir_") else "SELECT" for name in tables}
        _set_rights(conn, CONNECTOR, "health", rights)
    for role in {LOADER, OPERATOR} & existing:
        _set_rights(conn, role, "health", dict.fromkeys(tables, ""))
        _grant(conn, role, "USAGE ON SCHEMA health")
        for name in set(tables) & {"fhir_outbox", "fhir_processed_event", "fhir_dlq"}:
            _execute(
                conn,
                "GRANT SELECT ({}) ON {} TO {}",
                sql.SQL(", ").join(map(sql.Identifier, _list_columns(conn, "health", name, but="former_%"))),
                sql.Identifier("health", name),
                sql.Identifier(role),
            )


def grant_dagster_rights(conn: Connection) -> None:
    """Give the tables of Dagster's database, to which ``conn`` is connected, to ``fhir_dagster``."""
    _grant(conn, DAGSTER, "USAGE, CREATE ON SCHEMA public")
    for name in sorted(_list_grantable_tables(conn, "public", of_others_than=DAGSTER, kinds="rp")):
        _execute(conn, "ALTER TABLE {} OWNER TO {}", sql.Identifier("public", name), sql.Identifier(DAGSTER))


def ensure_login(conn: Connection, name: str, role: str, password: str | None) -> None:
    """Create a login that is a member of ``role`` and has no other right; set its password if one is given."""
    # Two calls at once would create the login twice.
    conn.execute("SELECT pg_advisory_xact_lock(hashtext('fhir_assets logins'))")
    if conn.execute("SELECT FROM pg_roles WHERE rolname = %s", [name]).fetchone() is None:
        _execute(conn, "CREATE ROLE {}", sql.Identifier(name))
    _execute(
        conn,
        "ALTER ROLE {} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS",
        sql.Identifier(name),
    )
    if password:
        verifier = conn.pgconn.encrypt_password(password.encode(), name.encode(), b"scram-sha-256").decode()
        _execute(conn, "ALTER ROLE {} PASSWORD {}", sql.Identifier(name), sql.Literal(verifier))
    _execute(conn, "GRANT {} TO {}", sql.Identifier(role), sql.Identifier(name))


def _grant(conn: Connection, role: str, *rights: str) -> None:
    """Grant rights, each as a GRANT statement names it between GRANT and TO."""
    for right in rights:
        _execute(conn, f"GRANT {right} TO {{}}", sql.Identifier(role))


def _set_rights(conn: Connection, role: str, schema: str, rights: dict[str, str]) -> None:
    """Grant a role its rights on tables of a schema, by the name of the table, and revoke all others."""
    if not rights:
        return
    tables_by_rights = defaultdict(list)
    for name, granted in rights.items():
        tables_by_rights[granted].append(sql.Identifier(schema, name))
    everything = sql.SQL(", ").join([sql.Identifier(schema, name) for name in rights])
    _execute(conn, "REVOKE ALL ON {} FROM {}", everything, sql.Identifier(role))
    for granted, tables in tables_by_rights.items():
        if granted:
            _execute(conn, f"GRANT {granted} ON {{}} TO {{}}", sql.SQL(", ").join(tables), sql.Identifier(role))


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


def _has_schema(conn: Connection, name: str) -> bool:
    return conn.execute("SELECT FROM pg_namespace WHERE nspname = %s", [name]).fetchone() is not None


def _list_columns(conn: Connection, schema: str, table: str, *, but: str) -> Sequence[str]:
    """Return the columns of a table whose names do not match a pattern of LIKE."""
    rows = conn.execute(
        """
        SELECT attname
        FROM pg_attribute
        WHERE attrelid = format('%%I.%%I', %s::text, %s::text)::regclass
        AND attnum > 0
        AND NOT attisdropped
        AND attname NOT LIKE %s
        ORDER BY attnum
        """,
        [schema, table, but],
    )
    return [name for (name,) in rows]


def _list_grantable_tables(
    conn: Connection, schema: str, *, of_others_than: str = "", kinds: str = "rpvmfSicIt"
) -> frozenset[str]:
    """Return the relations of some kinds that the current user may grant rights on, without those of a role."""
    rows = conn.execute(
        """
        SELECT relname
        FROM pg_class
        WHERE relnamespace = %s::regnamespace
        AND pg_has_role(relowner, 'USAGE')
        AND pg_get_userbyid(relowner) <> %s
        AND relkind = ANY(%s)
        """,
        [schema, of_others_than, list(kinds)],
    )
    return frozenset(name for (name,) in rows)


def _may_transfer_ownership(conn: Connection) -> bool:
    kind = "SET" if conn.info.server_version >= 160_000 else "MEMBER"
    row = conn.execute("SELECT pg_has_role(%s, %s)", [LOADER, kind]).fetchone()
    return bool(row and row[0])
