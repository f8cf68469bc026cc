"""Streams of the rows of a view's table, for exports, the lake and downstream assets."""

from collections.abc import Iterator, Sequence
from typing import Any

from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.tables.layout import TableLayout

_ROWS_PER_FETCH = 2000


def stream_rows(
    conn: Connection,
    layout: TableLayout,
    *,
    columns: Sequence[str] | None = None,
    partition_keys: Sequence[str] | None = None,
) -> Iterator[tuple[Any, ...]]:
    """Yield rows of a table in no particular order, in a transaction that ends with the last row.

    ``columns`` are the columns to return, all by default; ``partition_keys`` are the partitions of the resources, all
    by default.
    """
    query = sql.SQL("SELECT {columns} {source} AND {is_in_partitions}").format(
        columns=sql.SQL("v.*")
        if columns is None
        else sql.SQL(", ").join([sql.SQL("v.{}").format(sql.Identifier(column)) for column in columns]),
        source=join_resources(layout),
        is_in_partitions=sql.SQL("true" if partition_keys is None else "r.partition_key = ANY(%(keys)s)"),
    )
    keys = None if partition_keys is None else list(partition_keys)
    with conn.transaction(), conn.cursor(name="slice") as cursor:
        cursor.itersize = _ROWS_PER_FETCH
        yield from cursor.execute(query, {"type": layout.resource_type, "keys": keys})


def join_resources(layout: TableLayout) -> sql.Composed:
    """Return FROM and WHERE clauses that join a view's table ``v`` with ``fhir.resource`` ``r``, without tombstones.

    The clauses have the parameter ``%(type)s``, the resource type.
    """
    return sql.SQL("""
        FROM fhir.{table} v
        JOIN fhir.resource r ON r.source = v._source AND r.resource_type = %(type)s AND r.id = v.{key}
        WHERE r.source = ops.current_source()
            AND r.resource IS NOT NULL
    """).format(table=sql.Identifier(layout.name), key=sql.Identifier(layout.key))
