"""Runs as people ask about them: the latest ones, and one of them by resource type."""

from typing import Any

from psycopg.rows import dict_row

from fhir_assets.catalog import LOAD_ORDER
from fhir_assets.warehouse.database import Connection

_SUMS = """
    CASE WHEN bool_or(status = 'RUNNING') THEN 'RUNNING' WHEN bool_or(status = 'FAILED') THEN 'FAILED'
         ELSE 'SUCCESS' END AS status,
    count(DISTINCT partition_key) AS windows, min(partition_key) AS first_window, max(partition_key) AS last_window,
    sum(server_total)::bigint AS server_total, sum(fetched)::bigint AS fetched, sum(valid)::bigint AS valid,
    sum(dead)::bigint AS dead, sum(withheld)::bigint AS withheld, sum(loaded)::bigint AS loaded,
    min(started_at) AS started_at, max(finished_at) AS finished_at,
    extract(epoch FROM max(coalesce(finished_at, clock_timestamp())) - min(started_at))::float8 AS seconds
"""


def latest(
    conn: Connection, *, limit: int, status: str | None = None, resource_type: str | None = None
) -> list[dict[str, Any]]:
    """The latest runs, newest first, each with its counts over all types and windows."""
    cursor = conn.cursor(row_factory=dict_row)
    return cursor.execute(
        "SELECT * FROM (SELECT run_id, max(triggered_by) AS triggered_by, max(replay_of_run_id) AS replay_of_run_id,"
        + _SUMS
        + " FROM ops.ingestion_runs WHERE %(type)s::text IS NULL OR resource_type = %(type)s GROUP BY run_id) runs"
        " WHERE %(status)s::text IS NULL OR status = %(status)s ORDER BY started_at DESC LIMIT %(limit)s",
        {"type": resource_type, "status": status, "limit": limit},
    ).fetchall()


def by_type(conn: Connection, run_id: str) -> list[dict[str, Any]]:
    """The run whose id begins with ``run_id``, by resource type in load order; empty if there is none or several."""
    cursor = conn.cursor(row_factory=dict_row)
    rows = cursor.execute(
        "SELECT run_id, resource_type AS type, max(error) AS error, min(checkpoint_before) AS checkpoint_before,"
        " max(checkpoint_after) AS checkpoint_after,"
        + _SUMS
        + " FROM ops.ingestion_runs WHERE starts_with(run_id, %s) GROUP BY run_id, resource_type",
        [run_id],
    ).fetchall()
    if len({row["run_id"] for row in rows}) != 1:
        return []
    return sorted(rows, key=lambda row: LOAD_ORDER.get(row["type"], len(LOAD_ORDER)))
