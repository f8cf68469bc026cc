"""COPY alone: the rows of a loaded deployment copied into empty tables by one connection, with nothing else.

The rows are those of the tables of all views and of ``fhir.resource``, in the text format that a load sends. The copies
of the tables have the same compression, and no index unless asked for. The limit of any load into this Postgres.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from psycopg import Connection, sql

from benchmarks.meter import cpu_seconds_of, find_postgres
from benchmarks.processes import Spent
from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets.warehouse.postgres.db.connections import connect

_BLOCK = 1 << 20
_TABLES = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname IN ('fhir', 'fhir_partitions') AND c.relkind = 'r' AND pg_relation_size(c.oid) > 0 ORDER BY 1, 2
"""


@dataclass(frozen=True, slots=True)
class Copied:
    """The rows and bytes of all tables, and what the copy spent."""

    rows: int
    size: int
    spent: Spent


class CopyAlone:
    """The rows of the deployment in ``home``, written to files of ``folder``."""

    def __init__(self, home: Path, folder: Path) -> None:
        self._home = home
        self._files: dict[tuple[str, str], Path] = {}
        folder.mkdir()
        with connect(embedded.ensure(home)) as conn:
            for schema, table in conn.execute(_TABLES).fetchall():
                path = self._files[schema, table] = folder / f"{schema}.{table}"
                statement = sql.SQL("COPY {} TO STDOUT").format(sql.Identifier(schema, table))
                with path.open("wb") as file, conn.cursor().copy(statement) as rows:
                    for block in rows:
                        file.write(block)

    def measure(self, *, indexes: bool = False) -> Copied:
        """Copy all rows into empty tables, one transaction a table, and drop them again."""
        with connect(embedded.ensure(self._home)) as conn:
            names = [self._create(conn, *name, indexes=indexes) for name in self._files]
            conn.commit()
            postgres = find_postgres(self._home)
            count, started, own, before = 0, perf_counter(), process_time(), cpu_seconds_of(postgres)
            for name, path in zip(names, self._files.values(), strict=True):
                cursor = conn.cursor()
                with cursor.copy(sql.SQL("COPY {} FROM STDIN").format(name)) as rows:
                    for block in _read(path):
                        rows.write(block)
                count += cursor.rowcount
                conn.commit()
            spent = Spent(perf_counter() - started, process_time() - own, cpu_seconds_of(postgres) - before)
            conn.execute("DROP SCHEMA copied CASCADE")
            conn.commit()
        return Copied(count, sum(path.stat().st_size for path in self._files.values()), spent)

    def _create(self, conn: Connection[Any], schema: str, table: str, *, indexes: bool) -> sql.Identifier:
        name = sql.Identifier("copied", f"{schema}.{table}")
        conn.execute("CREATE SCHEMA IF NOT EXISTS copied")
        conn.execute(
            sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING COMPRESSION INCLUDING STORAGE{})").format(
                name, sql.Identifier(schema, table), sql.SQL(" INCLUDING INDEXES" if indexes else "")
            )
        )
        return name


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block
