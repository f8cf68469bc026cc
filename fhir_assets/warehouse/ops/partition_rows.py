"""``ops.partition_rows``: the number of resources in each partition of raw and validated, from its manifest."""

from collections.abc import Mapping

from fhir_assets.warehouse.postgres.db.connections import Connection


def record(conn: Connection, layer: str, resource_type: str, rows_by_partition: Mapping[str, int | None]) -> None:
    """Set the numbers of resources of partitions. None means unknown: the partition is about to change."""
    keys = sorted(rows_by_partition)
    conn.execute(
        """
        INSERT INTO ops.partition_rows (layer, resource_type, partition_key, row_count)
        SELECT %(layer)s, %(type)s, key, row_count
        FROM unnest(%(keys)s::text[], %(counts)s::bigint[]) AS partitions (key, row_count)
        ON CONFLICT (source, layer, resource_type, partition_key) DO UPDATE SET row_count = excluded.row_count
        """,
        {
            "layer": layer,
            "type": resource_type,
            "keys": keys,
            "counts": [rows_by_partition[key] for key in keys],
        },
    )


def record_missing(conn: Connection, layer: str, resource_type: str, rows_by_partition: Mapping[str, int]) -> None:
    """Set the numbers that are unknown. Numbers that a commit has recorded in the meantime are kept."""
    conn.execute(
        """
        UPDATE ops.partition_rows r
        SET row_count = counted.row_count
        FROM unnest(%(keys)s::text[], %(counts)s::bigint[]) AS counted (key, row_count)
        WHERE r.source = ops.current_source()
            AND r.layer = %(layer)s
            AND r.resource_type = %(type)s
            AND r.partition_key = counted.key
            AND r.row_count IS NULL
        """,
        {
            "layer": layer,
            "type": resource_type,
            "keys": list(rows_by_partition),
            "counts": list(rows_by_partition.values()),
        },
    )


def forget_all(conn: Connection) -> None:
    """Remove the numbers of all partitions of the source."""
    conn.execute("DELETE FROM ops.partition_rows WHERE source = ops.current_source()")


def count_all(conn: Connection, layer: str, resource_type: str) -> tuple[int, list[str]]:
    """Return the number of resources in all partitions, and the keys of partitions whose number is unknown."""
    [row] = conn.execute(
        """
        SELECT
            coalesce(sum(row_count), 0)::bigint,
            coalesce(array_agg(partition_key ORDER BY partition_key) FILTER (WHERE row_count IS NULL), '{}')
        FROM ops.partition_rows
        WHERE source = ops.current_source() AND layer = %s AND resource_type = %s
        """,
        [layer, resource_type],
    ).fetchall()
    return row
