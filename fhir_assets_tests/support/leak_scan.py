"""Scan every location where a deployment stores data: databases, files, logs, metrics, alerts and responses."""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.canaries import Canaries
from fhir_assets_tests.support.deployment import Deployment

Content = Iterator[tuple[str, bytes]]
"""The exact location and its uncompressed content."""

_PLAIN_TEXT_COLUMNS = {
    "health": {
        "patient": None,
        "patient_other_identifiers": None,
        "fhir_outbox": {"former_system", "former_value"},
        "fhir_delivered": {"identifier_system", "identifier_value"},
        "fhir_sent": {"identifier_system", "identifier_value"},
        "fhir_dlq": {"formers"},
    }
}
"""Tables (None) and columns that belong to the hospital: the source tables, and the identifiers by which the connector
finds their records on the server. They contain plain text on purpose.
"""


@dataclass
class Site:
    """A deployment and the output that a test collected from it."""

    url: str
    """URL of the database. Dagster's tables are in schema ``public``."""
    home: Path
    """FHIR_ASSETS_HOME: the store, DAGSTER_HOME, journals of uploads."""
    temporary: Path
    """TMPDIR of the processes."""
    output: Path
    """Folder with a file per process of its stdout and stderr."""
    server_log: Path
    """Log of Postgres."""
    alerts: list[dict[str, Any]] = field(default_factory=list)
    """Messages that the webhook received."""
    metrics: list[str] = field(default_factory=list)
    """Expositions that Prometheus read."""
    answers: list[bytes] = field(default_factory=list)
    """Responses of the API: bodies and headers of errors."""


def tables(url: str, schema: str) -> Content:
    """Yield the values of every column of a schema as text; ``bytea`` values also uncompressed."""
    with connect(url) as conn:
        columns = conn.execute(
            "SELECT c.relname, a.attname, a.atttypid = 'bytea'::regtype FROM pg_class c"
            " JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
            " WHERE c.relnamespace = to_regnamespace(%s) AND c.relkind = 'r' ORDER BY 1, a.attnum",
            [schema],
        ).fetchall()
        own: Mapping[str, set[str] | None] = _PLAIN_TEXT_COLUMNS.get(schema, {})
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


def statistics(url: str) -> Content:
    """Yield the values that the planner's statistics contain."""
    with connect(url, autocommit=True) as conn:
        conn.execute("ANALYZE")
        for schema, table, column, values in conn.execute(
            "SELECT schemaname, tablename, attname,"
            " concat_ws(' ', most_common_vals::text, histogram_bounds::text, most_common_elems::text)"
            " FROM pg_stats WHERE schemaname IN ('fhir', 'fhir_partitions', 'ops', 'public')"
        ):
            yield f"pg_stats of {schema}.{table}.{column}", values.encode()


def files(*folders: Path, without: Path | None = None) -> Content:
    """Yield the name and the content of every file of the folders."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not (without and path.is_relative_to(without)):
                where = str(path.relative_to(folder.parent))
                yield f"the name of {where}", path.name.encode()
                for content in unpacked(path.read_bytes()):
                    yield where, content


def unpacked(content: bytes) -> Iterator[bytes]:
    """Yield the content, and its decompressed form if it is gzip, or zlib as Dagster compresses large values."""
    yield content
    for unpack in (gzip.decompress, zlib.decompress):
        with suppress(OSError, EOFError, zlib.error):
            yield unpack(content)


def _texts(where: str, read: Callable[[Site], list[str] | list[bytes]]) -> Callable[[Site], Content]:
    def scan(site: Site) -> Content:
        for text in read(site):
            yield where, text.encode() if isinstance(text, str) else text

    return scan


LOCATIONS: Mapping[str, Callable[[Site], Content]] = {
    "Dagster's database": lambda site: tables(site.url, "public"),
    "Dagster's home and compute logs": lambda site: files(site.home / "dagster"),
    "operations": lambda site: tables(site.url, "ops"),
    "tables": lambda site: chain(tables(site.url, "fhir"), tables(site.url, "fhir_partitions")),
    "outbox": lambda site: tables(site.url, "health"),
    "statistics of the planner": lambda site: statistics(site.url),
    "store and spool": lambda site: files(site.home / "store"),
    "other files": lambda site: files(site.home, without=site.home / "store"),
    "temporary files": lambda site: files(site.temporary),
    "logs and error output": lambda site: files(site.output),
    "log of Postgres": lambda site: [("server.log", site.server_log.read_bytes())].__iter__(),
    "metrics": _texts("metrics", lambda site: site.metrics),
    "alerts": _texts("alerts", lambda site: [json.dumps(alert, ensure_ascii=False) for alert in site.alerts]),
    "answers to callers": _texts("answers", lambda site: site.answers),
}


def build_site(deployment: Deployment, folder: Path) -> Site:
    """Return the site of a deployment, with new folders for temporary files and output in ``folder``."""
    for name in ("temporary", "output"):
        (folder / name).mkdir()
    home = Path(os.environ["FHIR_ASSETS_TEST_HOME"])
    return Site(
        deployment.url,
        deployment.settings.home,
        folder / "temporary",
        folder / "output",
        (home / "postgres").resolve() / "server.log",
    )


def find_leaks(site: Site, canaries: Canaries, *places: str) -> set[tuple[str, str, str]]:
    """Return the markers outside of encrypted data: the kind of location, the exact location, and the element."""
    return {
        (name, where, element)
        for name in places or LOCATIONS
        for where, content in LOCATIONS[name](site)
        for element in canaries.found_in(content)
    }
