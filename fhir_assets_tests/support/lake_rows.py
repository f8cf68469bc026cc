"""Rows of the lake's files and of the tables in one form, so that tests can compare them."""

import json
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import orjson
from psycopg import sql

from fhir_assets.warehouse.exports.parquet import EXACT_COLUMN
from fhir_assets.warehouse.postgres.db.connections import Connection


def in_lake(lake: str, view: str) -> Counter[str]:
    """Return the rows of a view as DuckDB reads them from all windows, without the partition key. Without files the
    result is empty.
    """
    with duckdb.connect() as conn:
        conn.execute("SET TimeZone = 'UTC'")
        if not list(Path(lake, view).glob("*/*.parquet")):
            return Counter()
        query = "SELECT * FROM read_parquet(?, hive_partitioning = true)"
        rows = conn.execute(query, [f"{lake}/{view}/*/*.parquet"])
        added = {"partition_key", EXACT_COLUMN}
        wanted = [n for n, column in enumerate(rows.description) if column[0] not in added]
        return Counter(repr([plain(row[n]) for n in wanted]) for row in rows.fetchall())


def in_table(conn: Connection, view: str) -> Counter[str]:
    """Return the rows of a table without their source; JSON as text, as in Parquet."""
    columns = conn.execute(
        "SELECT column_name, data_type FROM information_schema.columns WHERE table_schema = 'fhir'"
        " AND table_name = %s AND column_name <> '_source' ORDER BY ordinal_position",
        [view],
    ).fetchall()
    kinds = {"jsonb": "::text"}
    chosen = [sql.Identifier(name) + sql.SQL(kinds.get(kind, "")) for name, kind in columns]
    query = sql.SQL("SELECT {} FROM fhir.{}").format(sql.SQL(", ").join(chosen), sql.Identifier(view))
    return Counter(repr(list(map(plain, row))) for row in conn.execute(query).fetchall())


def plain(value: Any) -> object:
    """Return a value without the differences of the two clients: zones, zeros, whitespace and numbers in JSON."""
    if isinstance(value, Decimal):
        return f"{value:f}".rstrip("0").rstrip(".") if "." in f"{value:f}" else f"{value:f}"
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, str) and value[:1] in ("{", "["):
        with suppress(ValueError):
            return orjson.dumps(json.loads(value, parse_int=float), option=orjson.OPT_SORT_KEYS)
    return value
