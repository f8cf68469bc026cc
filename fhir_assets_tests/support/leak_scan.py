"""Every place where a deployment leaves something behind, and all that is there, unpacked."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import connect

Found = Iterator[tuple[str, bytes]]
"""Where exactly, and what is there."""

_HOSPITALS_OWN = {
    "health": {
        "patient": None,
        "patient_other_identifiers": None,
        "fhir_outbox": {"former_system", "former_value"},
        "fhir_delivered": {"identifier_system", "identifier_value"},
        "fhir_dlq": {"formers"},
    }
}
"""Tables (None) and columns that are the hospital's own: the source tables, and the identifiers by which the connector
finds their records on the server.
"""


@dataclass
class Site:
    """A deployment, and what a test kept of it."""

    url: str
    """Its database, with Dagster's tables in schema public."""
    home: Path
    """FHIR_ASSETS_HOME: the store, DAGSTER_HOME, journals of uploads."""
    temporary: Path
    """TMPDIR of its processes."""
    output: Path
    """What its processes said on stdout and stderr: logs, errors, tracebacks. A file each."""
    server_log: Path
    """What Postgres says."""
    alerts: list[dict[str, Any]] = field(default_factory=list)
    """What the webhook was told."""
    metrics: list[str] = field(default_factory=list)
    """What Prometheus read."""
    answers: list[bytes] = field(default_factory=list)
    """What callers of the API were answered: bodies and headers of refusals."""


def tables(url: str, schema: str) -> Found:
    """Every row of every table of a schema as text; what is packed in a bytea as it is when unpacked."""
    with connect(url) as conn:
        columns = conn.execute(
            "SELECT c.relname, a.attname, a.atttypid = 'bytea'::regtype FROM pg_class c"
            " JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
            " WHERE c.relnamespace = to_regnamespace(%s) AND c.relkind = 'r' ORDER BY 1, a.attnum",
            [schema],
        ).fetchall()
        own: Mapping[str, set[str] | None] = _HOSPITALS_OWN.get(schema, {})
        for table, column, binary in columns:
            excepted = own.get(table, set())
            if excepted is None or column in excepted:
                continue
            query = sql.SQL("SELECT DISTINCT {} FROM {} WHERE {} IS NOT NULL").format(
                sql.Identifier(column) if binary else sql.SQL("{}::text").format(sql.Identifier(column)),
                sql.Identifier(schema, table),
                sql.Identifier(column),
            )
            where = f"{schema}.{table}.{column}"
            for (value,) in conn.execute(query):
                for content in unpacked(value.encode() if isinstance(value, str) else bytes(value)):
                    yield where, content


def statistics(url: str) -> Found:
    """What the planner keeps of the columns' values."""
    with connect(url, autocommit=True) as conn:
        conn.execute("ANALYZE")
        for schema, table, column, values in conn.execute(
            "SELECT schemaname, tablename, attname,"
            " concat_ws(' ', most_common_vals::text, histogram_bounds::text, most_common_elems::text)"
            " FROM pg_stats WHERE schemaname IN ('fhir', 'ops', 'public')"
        ):
            yield f"pg_stats of {schema}.{table}.{column}", values.encode()


def files(*folders: Path, without: Path | None = None) -> Found:
    """Every file of some folders, whatever its name; the name too."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not (without and path.is_relative_to(without)):
                where = str(path.relative_to(folder.parent))
                yield f"the name of {where}", path.name.encode()
                for content in unpacked(path.read_bytes()):
                    yield where, content


def unpacked(content: bytes) -> Iterator[bytes]:
    """The content, and what it is unpacked: gzip, or zlib as Dagster packs what is large."""
    yield content
    for unpack in (gzip.decompress, zlib.decompress):
        with suppress(OSError, EOFError, zlib.error):
            yield unpack(content)


def _texts(where: str, of: Callable[[Site], list[str] | list[bytes]]) -> Callable[[Site], Found]:
    def found(site: Site) -> Found:
        for each in of(site):
            yield where, each.encode() if isinstance(each, str) else each

    return found


PLACES: Mapping[str, Callable[[Site], Found]] = {
    "Dagster's database": lambda site: tables(site.url, "public"),
    "Dagster's home and compute logs": lambda site: files(site.home / "dagster"),
    "operations": lambda site: tables(site.url, "ops"),
    "tables": lambda site: tables(site.url, "fhir"),
    "outbox": lambda site: tables(site.url, "health"),
    "statistics of the planner": lambda site: statistics(site.url),
    "store and spool": lambda site: files(site.home / "store"),
    "other files": lambda site: files(site.home, without=site.home / "store"),
    "temporary files": lambda site: files(site.temporary),
    "logs and error output": lambda site: files(site.output),
    "log of Postgres": lambda site: [("server.log", site.server_log.read_bytes())].__iter__(),
    "metrics": _texts("metrics", lambda site: site.metrics),
    "alerts": _texts("alerts", lambda site: [json.dumps(each, ensure_ascii=False) for each in site.alerts]),
    "answers to callers": _texts("answers", lambda site: site.answers),
}
