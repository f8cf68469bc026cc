"""The current activity of Dagster, from its own database: daemons, ticks and unfinished runs.

The tables are those of the pinned Dagster 1.13.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg

from fhir_assets.warehouse.postgres.db.connections import Connection


@dataclass(frozen=True, slots=True)
class Tick:
    """The latest tick of a schedule or sensor.

    ``status`` is the status in Dagster: SUCCESS, SKIPPED, FAILURE or STARTED.
    """

    name: str
    status: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Activity:
    """The latest heartbeat of each kind of daemon, the latest tick of each schedule and sensor, and unfinished runs."""

    heartbeats: dict[str, datetime]
    ticks: list[Tick]
    unfinished_runs: dict[str, int]
    """The number of runs by status: QUEUED, STARTING, STARTED, CANCELING."""


def read_activity(conn: Connection) -> Activity:
    """Return the activity. It is empty before Dagster has created its tables."""
    try:
        return Activity(_read_heartbeats(conn), _read_ticks(conn), _count_unfinished_runs(conn))
    except psycopg.errors.UndefinedTable:
        conn.rollback()
        return Activity({}, [], {})


def has_unfinished_runs(conn: Connection) -> bool:
    """Return whether a run waits or goes on, or seems to: its process may have ended without a word.

    Raises psycopg.errors.UndefinedTable if Dagster's tables are not where this connection looks for them.
    """
    return bool(_count_unfinished_runs(conn))


def has_limit(conn: Connection, pool: str) -> bool:
    """Return whether a pool has a limit. Raises as ``has_unfinished_runs`` does."""
    row = conn.execute("SELECT EXISTS (SELECT FROM concurrency_limits WHERE concurrency_key = %s)", [pool]).fetchone()
    assert row is not None
    return bool(row[0])


def has_tables(conn: Connection) -> bool:
    """Return whether the database has Dagster's tables, in whatever schema. Without them Dagster has never run."""
    row = conn.execute("SELECT EXISTS (SELECT FROM pg_class WHERE relname = 'event_logs' AND relkind = 'r')").fetchone()
    assert row is not None
    return bool(row[0])


def _read_heartbeats(conn: Connection) -> dict[str, datetime]:
    rows = conn.execute(
        """
        SELECT daemon_type, max(timestamp)
        FROM daemon_heartbeats
        GROUP BY daemon_type
        ORDER BY daemon_type
        """
    )
    return {name: _as_utc(at) for name, at in rows}


def _read_ticks(conn: Connection) -> list[Tick]:
    rows = conn.execute(
        """
        SELECT DISTINCT ON (name) name, status, timestamp
        FROM (
            SELECT tick_body::jsonb ->> 'job_name' AS name, status, timestamp, id
            FROM job_ticks
            WHERE timestamp > now() - interval '2 days'
        ) tick
        WHERE name IS NOT NULL
        ORDER BY name, timestamp DESC, id DESC
        """
    )
    return [Tick(name, status, _as_utc(at)) for name, status, at in rows]


def _count_unfinished_runs(conn: Connection) -> dict[str, int]:
    rows = conn.execute(
        """
        SELECT status, count(*)
        FROM runs
        WHERE status IN ('NOT_STARTED', 'QUEUED', 'STARTING', 'STARTED', 'CANCELING')
        GROUP BY status
        ORDER BY status
        """
    )
    return dict(rows.fetchall())


def _as_utc(at: datetime) -> datetime:
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at
