"""The latest evaluations of asset checks in Dagster's own database.

The table is that of the pinned Dagster 1.13.
"""

import json

from fhir_assets.warehouse.postgres.db.connections import Connection


def find_failed_partitions(conn: Connection, check: str) -> list[tuple[tuple[str, ...], str]]:
    """Return the asset key and the partition of each latest evaluation of ``check`` that failed, in order.

    Evaluations without a partition, which summarize the partitions of a run, are left out. Raises
    psycopg.errors.UndefinedTable if Dagster's tables are not where this connection looks for them.
    """
    rows = conn.execute(
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
    )
    return [(tuple(json.loads(key)), partition) for key, partition in rows]
