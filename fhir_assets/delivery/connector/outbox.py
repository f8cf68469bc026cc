"""The repository of ``health.fhir_outbox``: claims, locks and reads events. Callers pass their connection.

A connector has a number and holds an advisory lock on it. Postgres releases the lock when the connection ends, so the
claims of a killed connector are free at once, without a timeout. The same connection locks the identifiers that are
being delivered, so that two records that exchange an identifier are never delivered at the same time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import psycopg
from psycopg import sql

from fhir_assets.delivery.connector.mapping import Identifier, Source
from fhir_assets.errors import ConfigurationError
from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.db.migrations import sql_folder

CHANNEL = "fhir_outbox"


@dataclass(frozen=True, slots=True)
class Claim:
    """A record that only this connector processes: its oldest waiting event and the number of claims of that event."""

    event_id: int
    source: str
    record_id: str
    attempts: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """The resource of a record on the server. ``resource_id`` is None if the server did not return it."""

    resource_id: str | None
    identifier: Identifier


@dataclass(frozen=True, slots=True)
class Change:
    """The current state of a claimed record, and the events that this state includes.

    Attributes:
        row: The row of the main table; None if it was deleted.
        formers: Former identifiers of the record that no row has now.
        shared: Whether another row has the identifier under which the record was delivered.
        contested: Whether the resource of another record still has the record's identifier, because a change of the
            other record is not delivered yet.

    """

    claim: Claim
    event_ids: list[int]
    txids: list[str]
    first_change_at: datetime
    row: dict[str, Any] | None
    children: dict[str, list[dict[str, Any]]]
    delivered: Delivered | None
    formers: tuple[Identifier, ...]
    shared: bool
    contested: bool
    locks: frozenset[int] = field(default_factory=frozenset)


def install(conn: Connection) -> None:
    """Create the tables and triggers of ``sql/outbox.sql``. Raises ConfigurationError without the privilege."""
    script = (sql_folder() / "outbox.sql").read_bytes()
    try:
        with conn.transaction():
            conn.execute("SELECT pg_advisory_xact_lock(%s, 0)", [advisory_locks.CONNECTOR])
            conn.execute(script)
    except psycopg.errors.InsufficientPrivilege:
        raise ConfigurationError(
            "the user of DB_URL may not create tables and triggers in schema health: run `fhir-assets connector "
            "install` as its owner"
        ) from None


def is_installed(conn: Connection) -> bool:
    """Return whether the outbox exists."""
    row = conn.execute("SELECT to_regclass('health.fhir_outbox')").fetchone()
    return row is not None and row[0] is not None


def enqueue_existing(conn: Connection, source: Source) -> int:
    """Insert an event for every row that was never delivered and does not wait. Return the number of events."""
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
                    WHERE d.source = %(source)s AND d.record_id = t.{key}::text
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
    """Subscribe this connection to notifications of changes."""
    conn.execute(sql.SQL("LISTEN {}").format(sql.Identifier(CHANNEL)))


def register_connector(conn: Connection) -> int:
    """Return a new number for this connector, locked until the connection ends."""
    row = conn.execute("SELECT nextval('health.fhir_connector_number')").fetchone()
    assert row is not None
    conn.execute("SELECT pg_advisory_lock(%s, %s)", [advisory_locks.CONNECTOR, row[0]])
    return int(row[0])


def release_orphans(conn: Connection) -> int:
    """Release the claims of connectors that ended without releasing them. Return the number of records."""
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
    """Claim up to ``limit`` records whose oldest event is due, the longest waiting first."""
    try:
        rows = conn.execute(_CLAIM, {"number": number, "sources": list(sources), "limit": limit}).fetchall()
    except psycopg.errors.UniqueViolation:
        # An older event became visible while another connector took a newer one of the same record.
        return []
    return sorted((Claim(*row) for row in rows), key=lambda claimed: claimed.event_id)


def lock_identifiers(conn: Connection, source: Source, claims: Sequence[Claim]) -> dict[str, dict[int, bool]]:
    """Try to lock all identifiers of the records (current, delivered or former) for this database session.

    Return the locks of each record, and whether each was granted. A session may take the same lock several times.
    """
    rows = conn.execute(
        _LOCK.format(**_names(conn, source)),
        {"source": source.name, "records": [c.record_id for c in claims], "key": advisory_locks.CONNECTOR_IDENTIFIER},
    )
    locks: dict[str, dict[int, bool]] = {c.record_id: {} for c in claims}
    for record_id, lock, granted in rows:
        locks[record_id][lock] = granted
    return locks


_LOCK = sql.SQL("""
    WITH wanted AS MATERIALIZED (
        SELECT DISTINCT o.record_id, hashtext(i.system || '|' || i.value) AS lock
        FROM health.fhir_outbox o
        LEFT JOIN {table} t ON t.{key} = o.record_id::{type}
        LEFT JOIN health.fhir_delivered d ON d.source = o.source AND d.record_id = o.record_id
        CROSS JOIN LATERAL (VALUES
            (o.former_system, o.former_value),
            (t.{system}::text, t.{value}::text),
            (d.identifier_system, d.identifier_value)
        ) AS i (system, value)
        WHERE o.source = %(source)s AND o.processed_at IS NULL AND o.record_id = ANY(%(records)s)
        AND i.system IS NOT NULL AND i.value IS NOT NULL
    )
    SELECT record_id, lock, pg_try_advisory_lock(%(key)s, lock)
    FROM wanted
""")


def unlock(conn: Connection, locks: Iterable[int]) -> None:
    """Release locks of identifiers. A lock that was taken several times must be in ``locks`` as often."""
    if lock_list := list(locks):
        conn.execute(
            "SELECT pg_advisory_unlock(%s, lock) FROM unnest(%s::int[]) lock",
            [advisory_locks.CONNECTOR_IDENTIFIER, lock_list],
        )


def read(conn: Connection, source: Source, claims: Sequence[Claim]) -> dict[str, tuple[Change, int | None]]:
    """Read the claimed records in one snapshot. Return each with the lock of its current identifier."""
    names = _names(conn, source)
    children = [
        sql.SQL("""
            {name},
            coalesce((
                SELECT jsonb_agg(to_jsonb(c) ORDER BY c.{order})
                FROM {table} c
                WHERE c.{key} = w.record_id::{type}
            ), '[]')
        """).format(
            name=sql.Literal(name),
            table=sql.Identifier(*child.table.split(".")),
            key=sql.Identifier(child.key),
            order=sql.Identifier(child.order),
            type=names["type"],
        )
        for name, child in source.children.items()
    ]
    rows = conn.execute(
        _READ.format(children=sql.SQL(", ").join(children), **names),
        {"source": source.name, "records": [c.record_id for c in claims]},
    )
    by_record = {c.record_id: c for c in claims}
    changes = {}
    for (
        record_id, ids, txids, since, row, child_rows, formers, resource_id, system, value, shared, contested, lock
    ) in rows:  # fmt: skip
        changes[record_id] = (
            Change(
                claim=by_record[record_id],
                event_ids=ids,
                txids=txids,
                first_change_at=since,
                row=row,
                children=child_rows,
                delivered=Delivered(resource_id, Identifier(system, value)) if system is not None else None,
                formers=tuple(Identifier(*former) for former in formers),
                shared=shared,
                contested=contested,
            ),
            lock,
        )
    return changes


_READ = sql.SQL("""
    WITH w AS MATERIALIZED (
        SELECT
            record_id,
            array_agg(id ORDER BY id) AS ids,
            array_agg(DISTINCT txid::text) AS txids,
            min(created_at) AS since,
            coalesce(
                jsonb_agg(DISTINCT jsonb_build_array(former_system, former_value))
                    FILTER (WHERE former_value IS NOT NULL),
                '[]'
            ) AS formers
        FROM health.fhir_outbox
        WHERE source = %(source)s AND processed_at IS NULL AND record_id = ANY(%(records)s)
        GROUP BY record_id
    )
    SELECT
        w.record_id,
        w.ids,
        w.txids,
        w.since,
        to_jsonb(t),
        jsonb_build_object({children}),
        (
            SELECT coalesce(jsonb_agg(f), '[]')
            FROM jsonb_array_elements(w.formers) f
            WHERE NOT EXISTS (
                SELECT FROM {table} other
                WHERE other.{system} = f ->> 0 AND other.{value} = f ->> 1
            )
        ),
        d.resource_id,
        d.identifier_system,
        d.identifier_value,
        EXISTS (
            SELECT FROM {table} other
            WHERE other.{system} = d.identifier_system
            AND other.{value} = d.identifier_value
            AND other.{key} <> w.record_id::{type}
        ),
        EXISTS (
            SELECT FROM health.fhir_outbox e
            JOIN health.fhir_delivered x
                ON x.source = e.source
                AND x.record_id = e.record_id
                AND x.identifier_system = e.former_system
                AND x.identifier_value = e.former_value
            WHERE e.processed_at IS NULL
            AND e.former_value IS NOT NULL
            AND e.source = %(source)s
            AND e.former_system = t.{system}
            AND e.former_value = t.{value}
            AND e.record_id <> w.record_id
        ),
        hashtext(t.{system} || '|' || t.{value})
    FROM w
    LEFT JOIN {table} t ON t.{key} = w.record_id::{type}
    LEFT JOIN health.fhir_delivered d ON d.source = %(source)s AND d.record_id = w.record_id
""")


def _names(conn: Connection, source: Source) -> Mapping[str, sql.Composable]:
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


def seconds_to_next(conn: Connection) -> float | None:
    """Return the seconds until the next waiting event is due; None if no event waits."""
    row = conn.execute("""
        SELECT extract(epoch FROM min(next_retry_at) - clock_timestamp())::float8
        FROM health.fhir_outbox
        WHERE processed_at IS NULL AND claimed_by IS NULL
    """).fetchone()
    return row[0] if row else None


@dataclass(frozen=True, slots=True)
class Status:
    """The state of the outbox: its changes, the age of the oldest waiting change, and the running connectors."""

    unprocessed: int
    retrying: int
    lag_seconds: float
    dead: int
    connectors: int


def read_status(conn: Connection) -> Status:
    """Return the state of the outbox."""
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
