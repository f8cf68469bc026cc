"""Resources in the tables that a source did not return when their windows were read again."""

from collections.abc import Iterable, Sequence

from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.queries.temporary_lines import temporary_lines
from fhir_assets.warehouse.postgres.tables.encoding import escape_text, is_storable


def find_vanished(
    conn: Connection, resource_type: str, partition_keys: Sequence[str], returned: Iterable[str], *, limit: int
) -> list[str]:
    """Return the ids of the resources of these windows that are in the tables and not in ``returned``.

    ``limit`` is the maximum number of ids. A returned id that Postgres cannot store is ignored: it is in no table.
    """
    lines = (f"{escape_text(resource_id)}\n" for resource_id in returned if is_storable(resource_id))
    with temporary_lines(conn, "returned_ids", {"id": "text"}, lines):
        rows = conn.execute(
            """
            SELECT r.id
            FROM fhir.resource r
            WHERE r.source = ops.current_source()
                AND r.resource_type = %(type)s
                AND r.partition_key = ANY(%(keys)s)
                AND r.deleted_at IS NULL
                AND NOT EXISTS (SELECT FROM returned_ids s WHERE s.id = r.id)
            ORDER BY r.id
            LIMIT %(limit)s
            """,
            {"type": resource_type, "keys": list(partition_keys), "limit": limit},
        ).fetchall()
    return [resource_id for (resource_id,) in rows]


def has_resources(conn: Connection, resource_type: str, partition_keys: Sequence[str]) -> bool:
    """Return whether the tables have resources of these windows."""
    row = conn.execute(
        """
        SELECT EXISTS (
            SELECT FROM fhir.resource
            WHERE source = ops.current_source()
                AND resource_type = %s
                AND partition_key = ANY(%s)
                AND deleted_at IS NULL
        )
        """,
        [resource_type, list(partition_keys)],
    ).fetchone()
    assert row
    return bool(row[0])
