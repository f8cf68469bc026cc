"""The numbers of loaded, dead and withheld resources by type."""

from typing import Any

from psycopg.rows import dict_row

from fhir_assets.catalog import LOAD_ORDER
from fhir_assets.warehouse.postgres.db.connections import Connection


def count_by_type(conn: Connection) -> list[dict[str, Any]]:
    """Return a row for each type in load order: ``type``, and the numbers ``loaded``, ``dead`` and ``withheld``.

    ``loaded`` resources are in the tables; ``dead`` are the dead letters that are neither resolved nor discarded.
    """
    rows = (
        conn.cursor(row_factory=dict_row)
        .execute(
            """
        SELECT
            resource_type AS type,
            sum(loaded)::bigint AS loaded,
            sum(dead)::bigint AS dead,
            sum(withheld)::bigint AS withheld
        FROM (
            SELECT resource_type, count(*) AS loaded, 0 AS dead, 0 AS withheld
            FROM fhir.resource
            WHERE source = ops.current_source() AND deleted_at IS NULL
            GROUP BY resource_type
            UNION ALL
            SELECT resource_type, 0, sum(occurrences), 0
            FROM ops.dead_letters
            WHERE source = ops.current_source() AND status IN ('open', 'replaying')
            GROUP BY resource_type
            UNION ALL
            SELECT resource_type, 0, 0, count(*)
            FROM ops.withheld
            WHERE source = ops.current_source()
            GROUP BY resource_type
        ) AS counts
        GROUP BY resource_type
        """
        )
        .fetchall()
    )
    return sorted(rows, key=lambda row: (LOAD_ORDER.get(row["type"], len(LOAD_ORDER)), row["type"]))
