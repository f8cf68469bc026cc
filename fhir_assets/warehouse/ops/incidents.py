"""``ops.incidents``: failures of runs, checks and schedules that last until a recovery, and the alerts about them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Literal

from psycopg import sql
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from fhir_assets.warehouse.postgres.db.connections import Connection

Kind = Literal["run", "check", "behind", "tick"]


@dataclass(frozen=True, slots=True)
class Incident:
    """A failure that lasts until all of its partitions recover.

    ``name`` is the job, the check (``asset:check``), the schedule or the sensor. ``partitions`` are the windows or
    resource types that still fail: ``[""]`` for a failure without partitions, ``[]`` once the incident is closed.
    ``counts`` are the numbers of the last failure.
    """

    id: int
    kind: Kind
    name: str
    partitions: list[str]
    counts: dict[str, int]
    run_id: str | None
    opened_at: datetime
    closed_at: datetime | None
    alerted_at: datetime | None
    all_clear_at: datetime | None


def record_failure(
    conn: Connection,
    kind: Kind,
    name: str,
    partitions: Iterable[str],
    *,
    run_id: str | None = None,
    counts: Mapping[str, int] | None = None,
) -> None:
    """Open an incident, or add the partitions to the open incident of this kind and name."""
    conn.execute(
        """
        INSERT INTO ops.incidents AS i (kind, name, partitions, run_id, counts)
        VALUES (%(kind)s, %(name)s, %(partitions)s, %(run_id)s, %(counts)s)
        ON CONFLICT (kind, name) WHERE closed_at IS NULL DO UPDATE SET
            run_id = excluded.run_id,
            counts = excluded.counts,
            partitions = ARRAY(SELECT DISTINCT unnest(i.partitions || excluded.partitions) ORDER BY 1)
        """,
        {
            "kind": kind,
            "name": name,
            "partitions": sorted(set(partitions)),
            "run_id": run_id,
            "counts": Jsonb(dict(counts or {})),
        },
    )


def record_recovery(conn: Connection, kind: Kind, name: str, partitions: Iterable[str]) -> None:
    """Remove recovered partitions from the open incident; close it when no partition is left."""
    conn.execute(
        """
        UPDATE ops.incidents
        SET partitions = still_failing, closed_at = CASE WHEN still_failing = '{}' THEN now() END
        FROM (
            SELECT
                id AS open_id,
                ARRAY(
                    SELECT unnest(partitions) EXCEPT SELECT unnest(%(partitions)s::text[]) ORDER BY 1
                ) AS still_failing
            FROM ops.incidents
            WHERE kind = %(kind)s AND name = %(name)s AND closed_at IS NULL
            FOR UPDATE
        ) AS open
        WHERE id = open.open_id
        """,
        {"kind": kind, "name": name, "partitions": list(partitions)},
    )


def announce(conn: Connection, deliver: Callable[[list[Incident], list[Incident]], bool]) -> None:
    """Call ``deliver(opened, closed)`` with the incidents that are not announced yet; record that if it returns True.

    An incident that opened and closed in one transaction is not announced. The rows are locked during the call, so that
    concurrent callers do not announce them twice. Commits.
    """
    with conn.transaction():
        opened = _lock_unannounced(conn, "alerted_at IS NULL AND closed_at IS DISTINCT FROM opened_at")
        closed = _lock_unannounced(conn, "alerted_at IS NOT NULL AND closed_at IS NOT NULL AND all_clear_at IS NULL")
        if (opened or closed) and deliver(opened, closed):
            conn.execute(
                "UPDATE ops.incidents SET alerted_at = now() WHERE id = ANY(%s)",
                [[incident.id for incident in opened]],
            )
            conn.execute(
                "UPDATE ops.incidents SET all_clear_at = now() WHERE id = ANY(%s)",
                [[incident.id for incident in closed]],
            )


def _lock_unannounced(conn: Connection, condition: str) -> list[Incident]:
    query = sql.SQL("SELECT {} FROM ops.incidents WHERE {} ORDER BY id LIMIT 500 FOR UPDATE SKIP LOCKED").format(
        sql.SQL(", ").join([sql.Identifier(field.name) for field in fields(Incident)]),
        sql.SQL(condition),
    )
    with conn.cursor(row_factory=class_row(Incident)) as cursor:
        return cursor.execute(query).fetchall()


def list_open(conn: Connection) -> list[Incident]:
    """Return the open incidents, oldest first."""
    query = sql.SQL("SELECT {} FROM ops.incidents WHERE closed_at IS NULL ORDER BY id").format(
        sql.SQL(", ").join([sql.Identifier(field.name) for field in fields(Incident)])
    )
    with conn.cursor(row_factory=class_row(Incident)) as cursor:
        return cursor.execute(query).fetchall()


@dataclass(frozen=True, slots=True)
class Cursor:
    """The ids of the last run event and the last check event whose incidents are recorded."""

    runs: int = 0
    checks: int = 0


def get_cursor(conn: Connection) -> Cursor | None:
    """Return the cursor, or None if none was stored."""
    row = conn.execute("SELECT runs, checks FROM ops.alert_cursor").fetchone()
    return Cursor(*row) if row else None


def set_cursor(conn: Connection, cursor: Cursor) -> None:
    """Store the cursor, in the transaction that records the incidents of the events up to it."""
    conn.execute(
        """
        INSERT INTO ops.alert_cursor (runs, checks)
        VALUES (%s, %s)
        ON CONFLICT (one) DO UPDATE SET runs = excluded.runs, checks = excluded.checks
        """,
        [cursor.runs, cursor.checks],
    )
