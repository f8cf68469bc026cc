"""Lists of runs for the command line and the API, read from ``ops.ingestion_runs`` and its views.

The functions that write these rows are in ``runs``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import sql
from psycopg.rows import dict_row

from fhir_assets.catalog import LOAD_ORDER
from fhir_assets.warehouse.postgres.db.connections import Connection


@dataclass(frozen=True, slots=True)
class FailedWindow:
    """A window whose last run failed. ``error`` contains no patient data."""

    partition_key: str
    run_id: str
    error: str | None


def list_runs(
    conn: Connection,
    *,
    limit: int,
    status: str | None = None,
    resource_type: str | None = None,
    since: datetime | None = None,
    triggered_by: str | None = None,
) -> list[dict[str, Any]]:
    """Return at most ``limit`` runs, newest first, as rows of ``ops.run_summary``: the sums of all types and windows.

    With ``resource_type``, return rows of ``ops.run_types``: the sums of the windows of this type. ``triggered_by`` is
    a prefix of the trigger: ``schedule``, ``cli``, ``replay``.
    """
    query = sql.SQL("""
        SELECT *
        FROM {view}
        WHERE (%(status)s::text IS NULL OR status = %(status)s)
            AND (%(since)s::timestamptz IS NULL OR started_at >= %(since)s)
            AND (%(by)s::text IS NULL OR starts_with(triggered_by, %(by)s))
            AND {is_of_type}
        ORDER BY started_at DESC
        LIMIT %(limit)s
    """).format(
        view=sql.Identifier("ops", "run_summary" if resource_type is None else "run_types"),
        is_of_type=sql.SQL("true" if resource_type is None else "resource_type = %(type)s"),
    )
    params = {"status": status, "since": since, "by": triggered_by, "type": resource_type, "limit": limit}
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, params).fetchall()


def list_types_of_run(conn: Connection, run_id: str) -> list[dict[str, Any]]:
    """Return a row for each resource type of a run, in load order.

    ``run_id`` may be the beginning of the id; the list is empty unless exactly one run matches. The key
    ``dead_letters`` holds the numbers of unresolved dead letters of the run by stage.
    """
    cursor = conn.cursor(row_factory=dict_row)
    rows = cursor.execute("SELECT * FROM ops.run_types WHERE starts_with(run_id, %s)", [run_id]).fetchall()
    if len({row["run_id"] for row in rows}) != 1:
        return []
    dead_letters: dict[str, dict[str, int]] = {}
    for resource_type, stage, count in conn.execute(
        """
        SELECT resource_type, stage, sum(occurrences)::bigint
        FROM ops.dead_letters
        WHERE run_id = %s AND status <> 'resolved'
        GROUP BY 1, 2
        """,
        [rows[0]["run_id"]],
    ):
        dead_letters.setdefault(resource_type, {})[stage] = count
    by_type = [{**row, "dead_letters": dead_letters.get(row["resource_type"], {})} for row in rows]
    return sorted(by_type, key=lambda row: LOAD_ORDER.get(row["resource_type"], len(LOAD_ORDER)))


def find_last_loads(conn: Connection) -> list[dict[str, Any]]:
    """Return the row of ``ops.run_types`` of the latest run of each resource type, in load order."""
    with conn.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(
            """
            SELECT DISTINCT ON (resource_type) *
            FROM ops.run_types
            ORDER BY resource_type, started_at DESC
            """
        ).fetchall()
    return sorted(rows, key=lambda row: LOAD_ORDER.get(row["resource_type"], len(LOAD_ORDER)))


def find_failed_windows(conn: Connection, resource_type: str) -> list[FailedWindow]:
    """Return the windows of a type whose last run failed, in order."""
    rows = conn.execute(
        """
        SELECT partition_key, run_id, error
        FROM (
            SELECT DISTINCT ON (partition_key) partition_key, run_id, error, status
            FROM ops.ingestion_runs
            WHERE resource_type = %s
            ORDER BY partition_key, started_at DESC
        ) AS last_runs
        WHERE status = 'FAILED'
        ORDER BY partition_key
        """,
        [resource_type],
    )
    return [FailedWindow(*row) for row in rows]


def has_unsuccessful_window(conn: Connection, resource_type: str, partition_keys: Sequence[str]) -> bool:
    """Return whether the last run of one of the windows of a type failed or has not ended."""
    row = conn.execute(
        """
        SELECT EXISTS (
            SELECT FROM (
                SELECT DISTINCT ON (partition_key) status
                FROM ops.ingestion_runs
                WHERE resource_type = %s AND partition_key = ANY(%s)
                ORDER BY partition_key, started_at DESC
            ) AS last_runs
            WHERE status <> 'SUCCESS'
        )
        """,
        [resource_type, list(partition_keys)],
    ).fetchone()
    assert row is not None
    return bool(row[0])
