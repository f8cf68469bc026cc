"""The rows of a view's table, streamed: what exports, the lake and assets downstream read."""

from collections.abc import Iterator, Sequence
from typing import Any

from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import Connection

_FETCHED = 2000


def stream_rows(
    conn: Connection,
    table: str,
    resource_type: str,
    *,
    columns: Sequence[str] | None = None,
    partition_keys: Sequence[str] | None = None,
) -> Iterator[tuple[Any, ...]]:
    """The rows, in no particular order: those ``columns``, of resources in those partitions; None: all of them."""
    query = sql.SQL("SELECT {} {} {}").format(
        sql.SQL("v.*")
        if columns is None
        else sql.SQL(", ").join([sql.SQL("v.{}").format(sql.Identifier(column)) for column in columns]),
        join_resources(table),
        sql.SQL("" if partition_keys is None else "AND r.partition_key = ANY(%(keys)s)"),
    )
    keys = None if partition_keys is None else list(partition_keys)
    with conn.transaction(), conn.cursor(name="slice") as cursor:
        cursor.itersize = _FETCHED
        yield from cursor.execute(query, {"type": resource_type, "keys": keys})


def join_resources(table: str) -> sql.Composed:
    """A table ``v`` and the resources ``r`` of type ``%(type)s`` that its rows are made of, deleted ones left out."""
    return sql.SQL(
        "FROM fhir.{} v JOIN fhir.resource r ON r.resource_type = %(type)s AND r.id = v._resource_key"
        " WHERE r.resource IS NOT NULL"
    ).format(sql.Identifier(table))
