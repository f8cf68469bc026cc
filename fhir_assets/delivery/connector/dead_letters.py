"""Access to the table ``health.fhir_dlq``: list, replay and discard changes that the FHIR server refused.

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
class DeadLetter:
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
) -> list[DeadLetter]:
    """Return dead letters, newest first. ``status=None`` and ``reason=None`` select all values."""
    columns = sql.SQL(", ").join([sql.Identifier(field.name) for field in fields(DeadLetter)])
    query = sql.SQL("""
        SELECT {}
        FROM health.fhir_dlq
        WHERE (%(status)s::text IS NULL OR status = %(status)s)
        AND (%(reason)s::text IS NULL OR reason = %(reason)s)
        ORDER BY id DESC
        LIMIT %(limit)s
    """).format(columns)
    with conn.cursor(row_factory=class_row(DeadLetter)) as cursor:
        return cursor.execute(query, {"status": status, "reason": reason, "limit": limit}).fetchall()


def replay(conn: Connection, ids: Sequence[int] | None, *, reason: str | None = None) -> int:
    """Requeue open dead letters in the outbox and return their number.

    If ``ids`` is None, all open dead letters are selected, or only those with ``reason``.
    """
    with conn.transaction():
        replayed_ids = _close(conn, ids, reason, "replayed")
        conn.execute(
            """
            INSERT INTO health.fhir_outbox (source, record_id, table_name, operation, former_system, former_value)
            SELECT DISTINCT source, record_id, source, 'REPLAY', former ->> 0, former ->> 1
            FROM health.fhir_dlq
            LEFT JOIN LATERAL jsonb_array_elements(formers) former ON true
            WHERE id = ANY(%s)
            """,
            [replayed_ids],
        )
        conn.execute("SELECT pg_notify(%s, '')", [CHANNEL])
    return len(replayed_ids)


def discard(conn: Connection, ids: Sequence[int] | None, *, reason: str | None = None) -> int:
    """Mark open dead letters as discarded and return their number. Their rows are kept."""
    with conn.transaction():
        return len(_close(conn, ids, reason, "discarded"))


def _close(conn: Connection, ids: Sequence[int] | None, reason: str | None, status: Status) -> list[int]:
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
