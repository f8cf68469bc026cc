"""The upgrade of a loaded deployment from a version whose views lack columns and tables, with real processes.

While `fhir-assets migrate` fills the new columns and tables from ``fhir.resource``, a reader reads and `fhir-assets
ingest` loads. The rows are compared with those of a fresh load.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from time import perf_counter
from typing import Any

import orjson
from psycopg import sql

from fhir_assets.sandbox.population import generate
from fhir_assets.warehouse.postgres.db.connections import Connection, connect, normalise_url
from fhir_assets_tests.support.deployment import BOOKKEEPING

ROOT = Path(__file__).resolve().parents[2]
START, BORDER, END = (datetime(2024, month, 1, tzinfo=UTC) for month in (1, 2, 3))
"""The older version loads the resources of the first month, and this version those of the second."""

NEWER_EVERY = 10
"""One of so many resources of the first month has a newer version in the second."""

RESOURCES_A_PATIENT = 30

_KEPT = re.compile(r"id|index|last_updated|\w+_index|\w+_key")
"""Columns that the older version has in any case: those of the keys."""

_PLAIN = {"column", "forEach", "forEachOrNull"}
_READ_TABLES = ("patient", "observation")


@dataclass(frozen=True)
class Upgrade:
    """What happened during an upgrade, and the tables whose rows differ from those of a fresh load."""

    resources: int
    """The resources that the older version had loaded."""
    load_seconds: float
    """The seconds in which it had loaded them."""
    seconds: float
    """The seconds of `fhir-assets migrate`."""
    output: str
    """What the command printed."""
    loaded_meanwhile: int
    """The resources that are new in the tables or have a newer version."""
    reads: int
    slowest_read: float
    """The seconds of the slowest read of a whole table."""
    lost_rows: list[str]
    """The tables in which a reader saw fewer rows than before."""
    differing: list[str]
    tables: int

    @property
    def progress(self) -> list[str]:
        """The lines that say how many resources' rows are up to date."""
        return [line for line in self.output.splitlines() if line.endswith("resources are up to date")]


def install_older_version(folder: Path) -> Path:
    """Copy this version to ``folder``, without every third column and without the tables of codings. Return it."""
    for name in ("fhir_assets", "sql"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("dagster.yaml", "workspace.yaml"):
        shutil.copy2(ROOT / name, folder / name)
    for path in (folder / "sql" / "views").glob("*.json"):
        if path.stem.endswith("_coding"):
            path.unlink()
        else:
            path.write_bytes(orjson.dumps(_remove_columns(orjson.loads(path.read_bytes()))))
    return folder


def _remove_columns(view: dict[str, Any]) -> dict[str, Any]:
    """Return the view without every third column that is not part of a key."""
    if all(set(select) <= _PLAIN for select in view["select"]):
        for select in view["select"]:
            own = [column for column in select["column"] if not _KEPT.fullmatch(column["name"])]
            removed = {column["name"] for column in own[2::3]}
            select["column"] = [column for column in select["column"] if column["name"] not in removed]
    return view


def write_resources(folder: Path, resources: int) -> None:
    """Write about ``resources`` synthetic resources of two months, by type, some of them in two versions."""
    folder.mkdir()
    lines: dict[str, list[bytes]] = {}
    patients = max(1, resources // RESOURCES_A_PATIENT)
    for number, (resource_type, body) in enumerate(generate(patients, start=START, end=END)):
        found = lines.setdefault(resource_type, [])
        found.append(body)
        if number % NEWER_EVERY == 0:
            found.append(_build_newer(body))
    for resource_type, found in lines.items():
        (folder / f"{resource_type}.ndjson").write_bytes(b"\n".join([*found, b""]))


def _build_newer(body: bytes) -> bytes:
    resource = orjson.loads(body)
    resource["meta"] |= {"versionId": "9", "lastUpdated": "2024-02-28T12:00:00.000Z"}
    return orjson.dumps(resource)


class Installation:
    """A deployment with a database at ``url``. Its commands run from the code of any version."""

    def __init__(self, url: str, home: Path, source: Path) -> None:
        self.url = url
        self._home = home
        self._environment = {
            "DB_URL": url,
            "DAGSTER_POSTGRES_URL": normalise_url(url, "psycopg2"),
            "FHIR_ASSETS_HOME": str(home),
            "FHIR_BASE_URL": str(source),
            "FHIR_SOURCE": "ndjson",
            "FHIR_LAST_UPDATED_GTE": START.isoformat(),
            "FHIR_PARTITION": "monthly",
        }
        home.mkdir()

    def run(self, code: Path, *arguments: str) -> str:
        """Run `fhir-assets` and return what it printed. Raises RuntimeError with it if the command fails."""
        inherited = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
        done = subprocess.run(
            [sys.executable, "-c", "from fhir_assets.cli import main; main()", *arguments],
            env={**inherited, **self._environment, "PYTHONPATH": str(code)},
            cwd=self._home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"fhir-assets {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def load(self, code: Path, first: datetime, last: datetime) -> None:
        """Load the windows of the months from ``first`` to ``last``."""
        self.run(code, "ingest", "--from", f"{first:%Y-%m-%d}", "--to", f"{last:%Y-%m-%d}")


class Reader:
    """Reads whole tables again and again, in a thread."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.stop = Event()
        self.reads = 0
        self.slowest = 0.0
        self.lost_rows: set[str] = set()

    def run(self) -> None:
        """Read until ``stop`` is set, at least once."""
        with connect(self._url, autocommit=True) as conn:
            known = dict.fromkeys(_READ_TABLES, 0)
            while not self.stop.wait(0.02) or not self.reads:
                for table, before in known.items():
                    started = perf_counter()
                    known[table] = _count(conn, table)
                    self.slowest = max(self.slowest, perf_counter() - started)
                    if known[table] < before:
                        self.lost_rows.add(table)
                self.reads += 1


def upgrade(url: str, fresh_url: str, folder: Path, resources: int) -> Upgrade:
    """Load with the older version, upgrade, and load all again into a database of its own with this version.

    Both databases are empty. ``folder`` gets the older version, the resources and the homes of the deployments.
    """
    older = install_older_version(folder / "older")
    write_resources(folder / "source", resources)
    deployment = Installation(url, folder / "home", folder / "source")
    deployment.run(older, "migrate")
    started = perf_counter()
    deployment.load(older, START, START)
    load_seconds = perf_counter() - started
    before = _read_versions(url)
    reader = Reader(url)
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(reader.run)
        loading = pool.submit(deployment.load, ROOT, BORDER, BORDER)
        try:
            started = perf_counter()
            output = deployment.run(ROOT, "migrate")
            seconds = perf_counter() - started
            loading.result()
        finally:
            reader.stop.set()
        reading.result()
    fresh = Installation(fresh_url, folder / "fresh", folder / "source")
    fresh.run(ROOT, "migrate")
    fresh.load(ROOT, START, BORDER)
    tables, expected = digest_tables(url), digest_tables(fresh_url)
    after = _read_versions(url)
    return Upgrade(
        resources=len(before),
        load_seconds=load_seconds,
        seconds=seconds,
        output=output,
        loaded_meanwhile=sum(before.get(key) != version for key, version in after.items()),
        reads=reader.reads,
        slowest_read=reader.slowest,
        lost_rows=sorted(reader.lost_rows),
        differing=sorted(name for name in {*tables, *expected} if tables.get(name) != expected.get(name)),
        tables=len(expected),
    )


def digest_tables(url: str) -> Mapping[str, tuple[int, int]]:
    """Return the number of rows of each table of schema fhir, and the sum of the hashes of its rows.

    Columns are compared by name, without those that say when a row was loaded.
    """
    with connect(url) as conn:
        return {table: _digest(conn, table, columns) for table, columns in _list_tables(conn)}


def _list_tables(conn: Connection) -> Iterator[tuple[str, list[str]]]:
    yield from conn.execute(
        """
        SELECT c.relname, array_agg(a.attname::text ORDER BY a.attname)
        FROM pg_class c
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.relnamespace = 'fhir'::regnamespace
            AND c.relkind IN ('r', 'p')
            AND NOT c.relispartition
            AND a.attname <> ALL(%s)
        GROUP BY 1
        ORDER BY 1
        """,
        [sorted(BOOKKEEPING)],
    ).fetchall()


def _digest(conn: Connection, table: str, columns: list[str]) -> tuple[int, int]:
    query = sql.SQL("SELECT count(*), coalesce(sum(hashtextextended(ROW({})::text, 0)), 0) FROM {}").format(
        sql.SQL(", ").join(map(sql.Identifier, columns)), sql.Identifier("fhir", table)
    )
    row = conn.execute(query).fetchone()
    assert row is not None
    return int(row[0]), int(row[1])


def _count(conn: Connection, table: str) -> int:
    row = conn.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier("fhir", table))).fetchone()
    assert row is not None
    return int(row[0])


def _read_versions(url: str) -> dict[tuple[str, str], str]:
    """Return the version of each resource."""
    with connect(url) as conn:
        rows = conn.execute("SELECT resource_type, id, version_id FROM fhir.resource").fetchall()
    return {(resource_type, key): version for resource_type, key, version in rows}
