"""What Dagster keeps of old runs, in its own database. Its tables are those of the pinned dagster 1.13."""

from datetime import datetime

from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import Connection

BATCH = 10_000
"""Rows of one deletion, in a transaction of its own."""

_KEPT = (
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
"""Events that say what state partitions and checks are in."""

_OLD_RUNS = sql.SQL(
    "r.status IN ('SUCCESS', 'FAILURE', 'CANCELED') AND r.update_timestamp < %(before)s::timestamptz AT TIME ZONE 'UTC'"
)
_EVENTS = sql.SQL(
    " FROM event_logs e JOIN runs r USING (run_id)"
    " WHERE {} AND (e.dagster_event_type IS NULL OR e.dagster_event_type <> ALL(%(kept)s))"
).format(_OLD_RUNS)
_TICKS = sql.SQL(
    " FROM job_ticks t WHERE t.timestamp < %(before)s::timestamptz AT TIME ZONE 'UTC' AND t.status <> 'STARTED'"
    " AND EXISTS (SELECT FROM job_ticks n WHERE n.selector_id = t.selector_id AND n.id > t.id)"
)
_RUNS = sql.SQL(
    " FROM runs r WHERE {} AND NOT EXISTS (SELECT FROM event_logs e WHERE e.run_id = r.run_id"
    " AND e.dagster_event_type = 'ASSET_MATERIALIZATION' AND NOT EXISTS (SELECT FROM event_logs n"
    " WHERE n.asset_key = e.asset_key AND n.partition IS NOT DISTINCT FROM e.partition"
    " AND n.dagster_event_type = 'ASSET_MATERIALIZATION' AND n.id > e.id))"
    " AND NOT EXISTS (SELECT FROM asset_check_executions c WHERE c.run_id = r.run_id AND NOT EXISTS"
    " (SELECT FROM asset_check_executions n WHERE n.asset_key = c.asset_key AND n.check_name = c.check_name"
    " AND n.partition IS NOT DISTINCT FROM c.partition AND n.id > c.id))"
).format(_OLD_RUNS)


def count_old_events(conn: Connection, before: datetime) -> int:
    """How many events of old runs say nothing of assets and checks: steps, logs, engine."""
    return _count(conn, _EVENTS, before)


def delete_old_events(conn: Connection, before: datetime) -> int:
    """Delete them, a batch at a time. Returns how many."""
    return _delete(conn, "event_logs", "e.id", _EVENTS, before)


def count_old_ticks(conn: Connection, before: datetime) -> int:
    """How many ticks of sensors and schedules are old; the last one of each stays."""
    return _count(conn, _TICKS, before)


def delete_old_ticks(conn: Connection, before: datetime) -> int:
    """Delete them, a batch at a time. Returns how many."""
    return _delete(conn, "job_ticks", "t.id", _TICKS, before)


def find_superseded_runs(conn: Connection, before: datetime) -> list[str]:
    """The ids of old runs whose every materialization and check was done again since: nothing in the UI rests on
    them.
    """
    query = sql.SQL("SELECT r.run_id {} ORDER BY r.id").format(_RUNS)
    return [run_id for (run_id,) in conn.execute(query, {"before": before})]


def _count(conn: Connection, what: sql.Composable, before: datetime) -> int:
    row = conn.execute(sql.SQL("SELECT count(*) {}").format(what), {"before": before, "kept": list(_KEPT)}).fetchone()
    return int(row[0]) if row else 0


def _delete(conn: Connection, table: str, key: str, what: sql.Composable, before: datetime) -> int:
    query = sql.SQL("DELETE FROM {} WHERE id IN (SELECT {} {} LIMIT {})").format(
        sql.Identifier(table), sql.Identifier(*key.split(".")), what, sql.Literal(BATCH)
    )
    total = 0
    while True:
        with conn.transaction():
            deleted = conn.execute(query, {"before": before, "kept": list(_KEPT)}).rowcount
        total += deleted
        if deleted < BATCH:
            return total
