"""Access to the table ``health.fhir_outbox``: insert, claim, lock and read its events.

Each connector has a number and holds an advisory lock on that number. Postgres releases the lock when the connection
ends, so another connector can release the claims of a killed connector without a timeout. The connection also
locks the identifiers of the records that it delivers. Two records that swap identifiers are therefore never delivered
at the same time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from fhir_assets.delivery.connector.mapping import Source
from fhir_assets.errors import ConfigurationError
from fhir_assets.warehouse.postgres.db import advisory_locks, roles
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.db.schema_state import sql_folder

CHANNEL = "fhir_outbox"


@dataclass(frozen=True, slots=True)
class Claim:
    """A record that a connector has claimed. ``attempts`` is how often its oldest waiting event has been claimed."""

    event_id: int
    source: str
    record_id: str
    attempts: int


def install(conn: Connection) -> None:
    """Create the tables and triggers of ``sql/outbox.sql``. Raises ConfigurationError if the user lacks a privilege."""
    script = (sql_folder() / "outbox.sql").read_bytes()
    try:
        with conn.transaction():
            conn.execute("SELECT pg_advisory_xact_lock(%s, 0)", [advisory_locks.CONNECTOR])
            conn.execute(script)
            roles.grant_outbox_rights(conn)
    except psycopg.errors.InsufficientPrivilege:
        raise ConfigurationError(
            f"the login {conn.info.user} of DB_URL may not create tables and triggers in schema health: run "
            "`fhir-assets connector install` as its owner"
        ) from None


def is_installed(conn: Connection) -> bool:
    """Return whether the tables of this release exist. The tables of an earlier release do not count."""
    row = conn.execute("SELECT to_regclass('health.fhir_outbox'), to_regclass('health.fhir_sent')").fetchone()
    return row is not None and None not in row


def enqueue_existing(conn: Connection, source: Source) -> int:
    """Insert an event for every row that has no known resource on the server and no waiting event.

    Return the number of events. The id of a resource is unknown if the row was never delivered, or was delivered by an
    earlier release to a server that did not return ids.
    """
    table = sql.Identifier(*source.table.split("."))
    key = sql.Identifier(source.key)
    with conn.transaction():
        count = conn.execute(
            sql.SQL("""
                INSERT INTO health.fhir_outbox (source, record_id, table_name, operation)
                SELECT %(source)s, t.{key}::text, %(table)s, 'REPLAY'
                FROM {table} t
                WHERE NOT EXISTS (
                    SELECT FROM health.fhir_delivered d
                    WHERE d.source = %(source)s AND d.record_id = t.{key}::text AND d.resource_id IS NOT NULL
                )
                AND NOT EXISTS (
                    SELECT FROM health.fhir_outbox o
                    WHERE o.source = %(source)s AND o.record_id = t.{key}::text AND o.processed_at IS NULL
                )
            """).format(table=table, key=key),
            {"source": source.name, "table": source.table.split(".")[-1]},
        ).rowcount
        conn.execute("SELECT pg_notify(%s, '')", [CHANNEL])
    return count


def listen(conn: Connection) -> None:
    """Subscribe the connection to the notifications that the triggers send."""
    conn.execute(sql.SQL("LISTEN {}").format(sql.Identifier(CHANNEL)))


def register_connector(conn: Connection) -> int:
    """Return a new number for a connector. The number is locked until the connection ends."""
    row = conn.execute("SELECT nextval('health.fhir_connector_number')").fetchone()
    assert row is not None
    conn.execute("SELECT pg_advisory_lock(%s, %s)", [advisory_locks.CONNECTOR, row[0]])
    return int(row[0])


def release_orphans(conn: Connection) -> int:
    """Release the claims of connectors that have ended. Return the number of records that were claimed."""
    return conn.execute(
        """
        UPDATE health.fhir_outbox
        SET claimed_by = NULL
        WHERE processed_at IS NULL
        AND claimed_by IS NOT NULL
        AND claimed_by NOT IN (
            SELECT objid::bigint
            FROM pg_locks
            WHERE locktype = 'advisory' AND granted AND classid::bigint = %s AND objsubid = 2
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        )
        """,
        [advisory_locks.CONNECTOR],
    ).rowcount


_CLAIM = """
    UPDATE health.fhir_outbox
    SET claimed_by = %(number)s, attempts = attempts + 1
    WHERE id IN (
        SELECT id
        FROM health.fhir_outbox o
        WHERE processed_at IS NULL AND claimed_by IS NULL AND next_retry_at <= now() AND source = ANY(%(sources)s)
        AND NOT EXISTS (
            SELECT FROM health.fhir_outbox e
            WHERE e.source = o.source AND e.record_id = o.record_id AND e.processed_at IS NULL
            AND (e.id < o.id OR e.claimed_by IS NOT NULL)
        )
        ORDER BY next_retry_at, id
        LIMIT %(limit)s
        FOR UPDATE SKIP LOCKED
    )
    RETURNING id, source, record_id, attempts
"""


def claim(conn: Connection, number: int, sources: Sequence[str], limit: int) -> list[Claim]:
    """Claim up to ``limit`` records whose oldest event is due. Return the claims in the order of their event ids."""
    try:
        rows = conn.execute(_CLAIM, {"number": number, "sources": list(sources), "limit": limit}).fetchall()
    except psycopg.errors.UniqueViolation:
        # An older event of a record became visible while another connector claimed a newer event of the same record.
        return []
    return sorted((Claim(*row) for row in rows), key=lambda claimed: claimed.event_id)


def lock_identifiers(conn: Connection, source: Source, claims: Sequence[Claim]) -> dict[str, dict[int, bool]]:
    """Try to lock all identifiers of the records (current, delivered or former) for this database session.

    Return the lock keys of each record, by record id, and whether each lock was granted. Postgres grants the same lock
    to a session several times, and the session must release it as often.
    """
    rows = conn.execute(
        _LOCK.format(**build_sql_parts(conn, source)),
        {"source": source.name, "records": [c.record_id for c in claims], "key": advisory_locks.CONNECTOR_IDENTIFIER},
    )
    locks: dict[str, dict[int, bool]] = {c.record_id: {} for c in claims}
    for record_id, lock, granted in rows:
        locks[record_id][lock] = granted
    return locks


_LOCK = sql.SQL("""
    WITH wanted AS MATERIALIZED (
        SELECT
            DISTINCT o.record_id,
            hashtext(health.fhir_clean(i.system) || '|' || health.fhir_clean(i.value)) AS lock
        FROM health.fhir_outbox o
        LEFT JOIN {table} t ON t.{key} = o.record_id::{type}
        LEFT JOIN health.fhir_delivered d ON d.source = o.source AND d.record_id = o.record_id
        LEFT JOIN health.fhir_sent s ON s.source = o.source AND s.record_id = o.record_id
        CROSS JOIN LATERAL (VALUES
            (o.former_system, o.former_value),
            (t.{system}::text, t.{value}::text),
            (d.identifier_system, d.identifier_value),
            (s.identifier_system, s.identifier_value)
        ) AS i (system, value)
        WHERE o.source = %(source)s AND o.processed_at IS NULL AND o.record_id = ANY(%(records)s)
        AND i.system IS NOT NULL AND i.value IS NOT NULL
    )
    SELECT record_id, lock, pg_try_advisory_lock(%(key)s, lock)
    FROM wanted
""")


def unlock_identifiers(conn: Connection, locks: Iterable[int]) -> None:
    """Release locks of identifiers. Each occurrence of a key in ``locks`` releases its lock once."""
    if lock_list := list(locks):
        conn.execute(
            "SELECT pg_advisory_unlock(%s, lock) FROM unnest(%s::int[]) lock",
            [advisory_locks.CONNECTOR_IDENTIFIER, lock_list],
        )


def build_sql_parts(conn: Connection, source: Source) -> Mapping[str, sql.Composable]:
    """Return the table, columns and key type of a source, as the parts of a statement about its main table."""
    return {
        "table": sql.Identifier(*source.table.split(".")),
        "key": sql.Identifier(source.key),
        "system": sql.Identifier(source.identifier.system),
        "value": sql.Identifier(source.identifier.value),
        "type": sql.SQL(read_key_type(conn, source)),
    }


_key_types: dict[tuple[str, str, str], str] = {}


def read_key_type(conn: Connection, source: Source) -> str:
    """Return the Postgres type of a source's key. Raises ConfigurationError if the table or column does not exist."""
    column = (conn.info.dsn, source.table, source.key)
    if column not in _key_types:
        row = conn.execute(
            """
            SELECT format_type(atttypid, NULL)
            FROM pg_attribute
            WHERE attrelid = to_regclass(%s) AND attname = %s AND NOT attisdropped
            """,
            [source.table, source.key],
        ).fetchone()
        if row is None:
            raise ConfigurationError(
                f"{source.table} with a column {source.key} does not exist: run `fhir-assets connector install`, "
                "or correct the mapping"
            )
        _key_types[column] = row[0]
    return _key_types[column]


def read_seconds_to_next_event(conn: Connection) -> float | None:
    """Return the seconds until the next unclaimed event is due (negative if overdue); None if there is no event."""
    row = conn.execute("""
        SELECT extract(epoch FROM min(next_retry_at) - clock_timestamp())::float8
        FROM health.fhir_outbox
        WHERE processed_at IS NULL AND claimed_by IS NULL
    """).fetchone()
    return row[0] if row else None


@dataclass(frozen=True, slots=True)
class Status:
    """The numbers of waiting changes, open dead letters and running connectors, and the age of the oldest change."""

    unprocessed: int
    retrying: int
    lag_seconds: float
    dead: int
    connectors: int


def read_status(conn: Connection) -> Status:
    """Read the state of the outbox."""
    row = conn.execute(
        """
        SELECT
            count(*),
            count(*) FILTER (WHERE attempts > 0 AND claimed_by IS NULL),
            coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8,
            (SELECT count(*) FROM health.fhir_dlq WHERE status = 'open'),
            (
                SELECT count(*)
                FROM pg_locks
                WHERE locktype = 'advisory' AND granted AND classid::bigint = %s AND objsubid = 2 AND objid <> 0
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
            )
        FROM health.fhir_outbox
        WHERE processed_at IS NULL
        """,
        [advisory_locks.CONNECTOR],
    ).fetchone()
    assert row is not None
    return Status(row[0], row[1], max(0.0, row[2]), row[3], row[4])
