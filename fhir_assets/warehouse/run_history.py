"""Runs as people ask about them: the latest ones, and one of them by resource type."""

from typing import Any

from psycopg.rows import dict_row

from fhir_assets.catalog import LOAD_ORDER
from fhir_assets.warehouse.database import Connection


def latest(
    conn: Connection, *, limit: int, status: str | None = None, resource_type: str | None = None
) -> list[dict[str, Any]]:
    """The latest runs, newest first, each over all types and windows; of one type where that is given."""
    cursor = conn.cursor(row_factory=dict_row)
    if resource_type is not None:
        return cursor.execute(
            "SELECT * FROM ops.run_types WHERE resource_type = %s AND (%s::text IS NULL OR status = %s)"
            " ORDER BY started_at DESC LIMIT %s",
            [resource_type, status, status, limit],
        ).fetchall()
    return cursor.execute(
        "SELECT * FROM ops.run_summary WHERE %s::text IS NULL OR status = %s ORDER BY started_at DESC LIMIT %s",
        [status, status, limit],
    ).fetchall()


def by_type(conn: Connection, run_id: str) -> list[dict[str, Any]]:
    """The run whose id begins with ``run_id``, by resource type in load order; empty if there is none or several."""
    cursor = conn.cursor(row_factory=dict_row)
    rows = cursor.execute("SELECT * FROM ops.run_types WHERE starts_with(run_id, %s)", [run_id]).fetchall()
    if len({row["run_id"] for row in rows}) != 1:
        return []
    return sorted(rows, key=lambda row: LOAD_ORDER.get(row["resource_type"], len(LOAD_ORDER)))
