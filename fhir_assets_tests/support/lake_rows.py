"""Rows of the lake's files and of the tables in one form, so that tests can compare them."""

import json
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import orjson
from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import Connection


def in_lake(lake: str, view: str) -> Counter[str]:
    """Return the rows of a view as DuckDB reads them from all windows, without the partition key. Without files the
    result is empty.
    """
    with duckdb.connect() as conn:
        conn.execute("SET TimeZone = 'UTC'")
        if not list(Path(lake, view).glob("*/*.parquet")):
            return Counter()
        query = "SELECT * EXCLUDE partition_key FROM read_parquet(?, hive_partitioning = true)"
        rows = conn.execute(query, [f"{lake}/{view}/*/*.parquet"])
        return Counter(repr(list(map(plain, row))) for row in rows.fetchall())


def in_table(conn: Connection, view: str) -> Counter[str]:
    """Return the rows of a table without their source; JSON as text and numeric as double, as in Parquet."""
    columns = conn.execute(
        "SELECT column_name, data_type FROM information_schema.columns WHERE table_schema = 'fhir'"
        " AND table_name = %s AND column_name <> '_source' ORDER BY ordinal_position",
        [view],
    ).fetchall()
    kinds = {"jsonb": "::text", "numeric": "::double precision"}
    chosen = [sql.Identifier(name) + sql.SQL(kinds.get(kind, "")) for name, kind in columns]
    query = sql.SQL("SELECT {} FROM fhir.{}").format(sql.SQL(", ").join(chosen), sql.Identifier(view))
    return Counter(repr(list(map(plain, row))) for row in conn.execute(query).fetchall())


def plain(value: Any) -> object:
    """Return a value without the differences of the two clients: time zones, whitespace and numbers in JSON."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, str) and value[:1] in ("{", "["):
        with suppress(ValueError):
            return orjson.dumps(json.loads(value, parse_int=float), option=orjson.OPT_SORT_KEYS)
    return value
