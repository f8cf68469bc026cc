"""DuckDB with SQL written by hand, in a process of its own, and what its Parquet files contain.

DuckDB is not a dependency of the project: ``pip install duckdb`` in the environment of the benchmarks.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.processes import Spent, run
from fhir_assets.warehouse.postgres.db import embedded

PROGRAM = "import sys, duckdb; duckdb.connect().execute(sys.argv[1])"
"""A program for ``python -c`` that executes the statement of its argument."""

_SUMMARY = """
import sys, duckdb
print(*duckdb.connect().execute(
    "SELECT count(*), coalesce(sum(hash(r)::HUGEINT), 0) FROM read_parquet(?) r", [sys.argv[1]]).fetchone())
"""
_COPY = """
import os, sys, threading
import duckdb, psycopg

def send(table, into):
    with os.fdopen(into, "wb") as file, conn.cursor().copy(f"COPY fhir.{table} TO STDOUT (FORMAT csv)") as rows:
        for block in rows:
            file.write(block)

url, folder, *tables = sys.argv[1:]
target = duckdb.connect()
with psycopg.connect(url) as conn:
    for table in tables:
        columns = {name: "DOUBLE" if kind == "numeric" else kind for name, kind in conn.execute(
            "SELECT column_name, data_type FROM information_schema.columns"
            " WHERE table_schema = 'fhir' AND table_name = %s ORDER BY ordinal_position", [table])}
        out, into = os.pipe()
        sender = threading.Thread(target=send, args=(table, into))
        sender.start()
        source = f"read_csv('/dev/fd/{out}', columns = {columns}, header = false, auto_detect = false)"
        target.execute(f"COPY (SELECT * FROM {source}) TO '{folder}/{table}.parquet' (FORMAT parquet)")
        sender.join()
        os.close(out)
"""


def summarize(path: Path) -> tuple[int, int]:
    """Return the number of the rows of a Parquet file, and a checksum of them that does not depend on their order."""
    output = subprocess.check_output([sys.executable, "-c", _SUMMARY, str(path)])
    count, checksum = output.split()
    return int(count), int(checksum)


def copy_tables(home: Path, tables: Sequence[str], folder: Path) -> tuple[Spent, int]:
    """Copy tables of ``fhir`` from the embedded Postgres in ``home`` to Parquet. Return what it spent, and the rows."""
    folder.mkdir(exist_ok=True)
    _, spent = run([sys.executable, "-c", _COPY, embedded.ensure(home), str(folder), *tables], home=home)
    return spent, sum(summarize(folder / f"{table}.parquet")[0] for table in tables)
