"""Rewrites the rows of views from the resources in ``fhir.resource``, which are not changed."""

from collections.abc import Sequence

from psycopg import sql

from fhir_assets.fhir.views import View
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of
from fhir_assets.warehouse.postgres.tables.copy_blocks import CopyBlock
from fhir_assets.warehouse.postgres.tables.load_statements import build_view_statements

BATCH_RESOURCES = 1000
BATCH_BYTES = 4 << 20


def count_resources(conn: Connection, resource_type: str) -> int:
    """Return the number of resources of a type in the tables."""
    row = conn.execute(
        """
        SELECT count(*)
        FROM fhir.resource
        WHERE source = ops.current_source()
            AND resource_type = %s
            AND resource IS NOT NULL
        """,
        [resource_type],
    ).fetchone()
    return int(row[0]) if row else 0


def find_next_ids(conn: Connection, resource_type: str, after: str) -> list[str]:
    """Return the ids of the next resources after an id, in order: about BATCH_BYTES of them, but at least one."""
    rows = conn.execute(
        """
        SELECT id
        FROM (
            SELECT id, sum(pg_column_size(resource)) OVER (ORDER BY id) - pg_column_size(resource) AS size_before
            FROM (
                SELECT id, resource
                FROM fhir.resource
                WHERE source = ops.current_source()
                    AND resource_type = %(type)s
                    AND id > %(after)s
                    AND resource IS NOT NULL
                ORDER BY id
                LIMIT %(limit)s
            ) next
        ) sized
        WHERE size_before < %(bytes)s
        ORDER BY id
        """,
        {"type": resource_type, "after": after, "limit": BATCH_RESOURCES, "bytes": BATCH_BYTES},
    )
    return [resource_id for (resource_id,) in rows]


def lock_bodies(conn: Connection, resource_type: str, ids: Sequence[str]) -> list[tuple[str, str | None, str]]:
    """Lock resources until the transaction ends. Return the id, the key id and the stored text of each.

    They are locked in the order in which loads write them, whatever the collation of the database.
    """
    return conn.execute(
        """
        SELECT id, key_id, CASE WHEN key_id IS NULL THEN resource::text ELSE resource #>> '{}' END
        FROM fhir.resource
        WHERE source = ops.current_source()
            AND resource_type = %s
            AND id = ANY(%s)
            AND resource IS NOT NULL
        ORDER BY id COLLATE "C"
        FOR UPDATE
        """,
        [resource_type, list(ids)],
    ).fetchall()


def replace_rows(conn: Session, views: Sequence[View], block: CopyBlock) -> None:
    """Replace the rows of the resources of a block in the tables of ``views``. The block was built for these views."""
    for view, lines in zip(views, block.view_lines, strict=True):
        statements = build_view_statements(view, encrypted=cipher_of(conn).encrypts)
        conn.execute(statements.delete, [block.ids])
        with conn.cursor() as cursor, cursor.copy(statements.copy) as copy:
            copy.write(lines.text)


def analyze(conn: Connection, views: Sequence[View]) -> None:
    """Update the statistics of the tables of views, which the planner of Postgres uses."""
    for view in views:
        conn.execute(sql.SQL("ANALYZE {}").format(sql.Identifier("fhir", view.name)))
