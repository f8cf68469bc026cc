"""The latest evaluations of asset checks in Dagster's own database.

The table is that of the pinned Dagster 1.13.
"""

import json

import psycopg

from fhir_assets.warehouse.postgres.db.connections import Connection


def find_failed_partitions(conn: Connection, check: str) -> list[tuple[tuple[str, ...], str]]:
    """Return the asset key and the partition of each latest evaluation of ``check`` that failed, in order.

    Evaluations without a partition, which summarize the partitions of a run, are left out. There are none before
    Dagster has created its tables.
    """
    try:
        rows = _find_failed_partitions(conn, check)
    except psycopg.errors.UndefinedTable:
        conn.rollback()
        return []
    return [(tuple(json.loads(key)), partition) for key, partition in rows]


def _find_failed_partitions(conn: Connection, check: str) -> list[tuple[str, str]]:
    return conn.execute(
        """
        SELECT DISTINCT e.asset_key, e.partition
        FROM asset_check_executions e
        WHERE e.check_name = %(check)s
            AND e.execution_status = 'FAILED'
            AND e.partition IS NOT NULL
            AND NOT EXISTS (
                SELECT
                FROM asset_check_executions later
                WHERE later.asset_key = e.asset_key
                    AND later.check_name = e.check_name
                    AND later.partition = e.partition
                    AND later.execution_status IN ('SUCCEEDED', 'FAILED')
                    AND later.id > e.id
            )
        ORDER BY e.asset_key, e.partition
        """,
        {"check": check},
    ).fetchall()
