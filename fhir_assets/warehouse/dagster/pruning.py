"""Counts and deletes old events, ticks and runs in Dagster's own database.

The tables are those of the pinned Dagster 1.13. Times are passed with a zone; Dagster stores UTC without a zone.
"""

from datetime import datetime

from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import Connection

BATCH = 10_000
"""The number of rows that one transaction deletes."""

_KEPT_EVENTS = (
    "ASSET_MATERIALIZATION",
    "ASSET_MATERIALIZATION_PLANNED",
    "ASSET_OBSERVATION",
    "ASSET_CHECK_EVALUATION",
    "ASSET_CHECK_EVALUATION_PLANNED",
    "RUN_START",
    "RUN_SUCCESS",
    "RUN_FAILURE",
    "RUN_CANCELED",
)
"""Events from which Dagster derives the state of partitions, checks and runs."""

_OLD_EVENTS = sql.SQL("""
    FROM event_logs e
    JOIN runs r USING (run_id)
    WHERE r.status IN ('SUCCESS', 'FAILURE', 'CANCELED')
        AND r.update_timestamp < %(before)s::timestamptz AT TIME ZONE 'UTC'
        AND (e.dagster_event_type IS NULL OR e.dagster_event_type <> ALL(%(kept)s))
""")
_OLD_TICKS = sql.SQL("""
    FROM job_ticks t
    WHERE t.timestamp < %(before)s::timestamptz AT TIME ZONE 'UTC'
        AND t.status <> 'STARTED'
        AND EXISTS (SELECT FROM job_ticks later WHERE later.selector_id = t.selector_id AND later.id > t.id)
""")
_SUPERSEDED_RUNS = """
    SELECT r.run_id
    FROM runs r
    WHERE r.status IN ('SUCCESS', 'FAILURE', 'CANCELED')
        AND r.update_timestamp < %(before)s::timestamptz AT TIME ZONE 'UTC'
        AND NOT EXISTS (
            SELECT FROM event_logs e
            WHERE e.run_id = r.run_id
                AND e.dagster_event_type = 'ASSET_MATERIALIZATION'
                AND NOT EXISTS (
                    SELECT FROM event_logs later
                    WHERE later.asset_key = e.asset_key
                        AND later.partition IS NOT DISTINCT FROM e.partition
                        AND later.dagster_event_type = 'ASSET_MATERIALIZATION'
                        AND later.id > e.id
                )
        )
        AND NOT EXISTS (
            SELECT FROM asset_check_executions c
            WHERE c.run_id = r.run_id
                AND NOT EXISTS (
                    SELECT FROM asset_check_executions later
                    WHERE later.asset_key = c.asset_key
                        AND later.check_name = c.check_name
                        AND later.partition IS NOT DISTINCT FROM c.partition
                        AND later.id > c.id
                )
        )
    ORDER BY r.id
"""


def count_old_events(conn: Connection, before: datetime) -> int:
    """Count the events of runs that ended before a time, without the events of _KEPT_EVENTS."""
    return _count(conn, _OLD_EVENTS, before)


def delete_old_events(conn: Connection, before: datetime) -> int:
    """Delete the events that ``count_old_events`` counts, in batches, and return their number."""
    return _delete(conn, "event_logs", "e.id", _OLD_EVENTS, before)


def count_old_ticks(conn: Connection, before: datetime) -> int:
    """Count the ticks before a time, without the last tick of each sensor and schedule."""
    return _count(conn, _OLD_TICKS, before)


def delete_old_ticks(conn: Connection, before: datetime) -> int:
    """Delete the ticks that ``count_old_ticks`` counts, in batches, and return their number."""
    return _delete(conn, "job_ticks", "t.id", _OLD_TICKS, before)


def find_superseded_runs(conn: Connection, before: datetime) -> list[str]:
    """Return the ids of runs that ended before a time and whose assets and checks were all repeated by later runs."""
    return [run_id for (run_id,) in conn.execute(_SUPERSEDED_RUNS, {"before": before})]


def _count(conn: Connection, source: sql.Composable, before: datetime) -> int:
    query = sql.SQL("SELECT count(*) {source}").format(source=source)
    row = conn.execute(query, {"before": before, "kept": list(_KEPT_EVENTS)}).fetchone()
    return int(row[0]) if row else 0


def _delete(conn: Connection, table: str, key: str, source: sql.Composable, before: datetime) -> int:
    query = sql.SQL("DELETE FROM {table} WHERE id IN (SELECT {key} {source} LIMIT {batch})").format(
        table=sql.Identifier(table), key=sql.Identifier(*key.split(".")), source=source, batch=sql.Literal(BATCH)
    )
    total = 0
    while True:
        with conn.transaction():
            deleted = conn.execute(query, {"before": before, "kept": list(_KEPT_EVENTS)}).rowcount
        total += deleted
        if deleted < BATCH:
            return total
