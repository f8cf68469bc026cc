"""The repository of ``health.fhir_dlq``: changes that the FHIR server refused, to be listed, replayed or discarded.

A replay sends the current row, so that it never restores an older state.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Literal

from psycopg import sql
from psycopg.rows import class_row

from fhir_assets.delivery.connector.outbox import CHANNEL
from fhir_assets.warehouse.postgres.db.connections import Connection

Status = Literal["open", "replayed", "superseded", "discarded"]


@dataclass(frozen=True, slots=True)
class DeadChange:
    """A change that could not be delivered. ``record_id`` is the key of its row in the source's table."""

    id: int
    source: str
    record_id: str
    reason: str
    message: str
    http_status: int | None
    attempts: int
    first_change_at: datetime
    failed_at: datetime
    status: str


def find(
    conn: Connection, *, status: Status | None = "open", reason: str | None = None, limit: int = 50
) -> list[DeadChange]:
    """Return dead changes, the newest first. ``status`` or ``reason`` None means any."""
    columns = sql.SQL(", ").join([sql.Identifier(field.name) for field in fields(DeadChange)])
    query = sql.SQL("""
        SELECT {}
        FROM health.fhir_dlq
        WHERE (%(status)s::text IS NULL OR status = %(status)s)
        AND (%(reason)s::text IS NULL OR reason = %(reason)s)
        ORDER BY id DESC
        LIMIT %(limit)s
    """).format(columns)
    with conn.cursor(row_factory=class_row(DeadChange)) as cursor:
        return cursor.execute(query, {"status": status, "reason": reason, "limit": limit}).fetchall()


def replay(conn: Connection, ids: Sequence[int] | None, *, reason: str | None = None) -> int:
    """Put open dead changes back into the outbox and return their number.

    ``ids`` None selects all open dead changes, or only those with ``reason``.
    """
    with conn.transaction():
        settled = _settle(conn, ids, reason, "replayed")
        conn.execute(
            """
            INSERT INTO health.fhir_outbox (source, record_id, table_name, operation, former_system, former_value)
            SELECT DISTINCT source, record_id, source, 'REPLAY', former ->> 0, former ->> 1
            FROM health.fhir_dlq
            LEFT JOIN LATERAL jsonb_array_elements(formers) former ON true
            WHERE id = ANY(%s)
            """,
            [settled],
        )
        conn.execute("SELECT pg_notify(%s, '')", [CHANNEL])
    return len(settled)


def discard(conn: Connection, ids: Sequence[int] | None, *, reason: str | None = None) -> int:
    """Mark open dead changes as discarded and return their number. They remain listed."""
    with conn.transaction():
        return len(_settle(conn, ids, reason, "discarded"))


def _settle(conn: Connection, ids: Sequence[int] | None, reason: str | None, status: Status) -> list[int]:
    rows = conn.execute(
        """
        UPDATE health.fhir_dlq
        SET status = %(status)s, settled_at = clock_timestamp()
        WHERE status = 'open'
        AND (%(ids)s::bigint[] IS NULL OR id = ANY(%(ids)s))
        AND (%(reason)s::text IS NULL OR reason = %(reason)s)
        RETURNING id
        """,
        {"status": status, "ids": None if ids is None else list(ids), "reason": reason},
    )
    return [row[0] for row in rows]
