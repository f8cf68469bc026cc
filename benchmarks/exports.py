"""Measure exports: their peak memory, which must not grow with the number of resources, and their speed.

``python -m benchmarks.exports [observations]`` loads that many Observations. ``fhir-assets export`` then exports the
valid resources and the tables as Parquet, in a process of its own. The tables alone are compared with DuckDB's COPY.
DuckDB would download its extension for Postgres, so it reads what Postgres' COPY gives as CSV, through a pipe.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from benchmarks import population
from benchmarks.deployment import load
from benchmarks.duckdb_peer import copy_tables
from benchmarks.figures import Figure, report
from benchmarks.machine import scratch
from benchmarks.processes import Spent, run

COUNT = 1_000_000
LIMIT_MIB = 300
GOAL_RATIO = 1.0
"""The least ratio of DuckDB's seconds to ours, for the tables."""

_ROUNDS = 3
_PROGRAM = "from fhir_assets.cli import main; main()"


def main(count: int = COUNT) -> int:
    """Print the figures. Return 1 if the peak exceeds the limit or a goal is missed."""
    with scratch() as home:
        source = home / "Observation.ndjson.gz"
        population.write_observations(source, count)
        load(home, source, fhir_resource_types="Observation")
        _, spent, rows = _export(home)
        print(
            f"{count:>12,} Observations, valid and tables, {rows:,} rows  {spent} {rows / spent.seconds:>10,.0f} rows/s"
        )
        print(f"limit {LIMIT_MIB} MiB: {'exceeded' if spent.peak_mib >= LIMIT_MIB else 'kept'}")
        pairs = [_compare(home) for _ in range(_ROUNDS)]
    ours, peer = sorted(pairs, key=lambda pair: pair[1].seconds / pair[0].seconds)[len(pairs) // 2]
    ratio = peer.seconds / ours.seconds
    work = f"export of the tables of {count:,} Observations to Parquet"
    missed = report(Figure(5, work, ratio, GOAL_RATIO, " times DuckDB", True, ours, peer, "DuckDB, from COPY as CSV"))
    return int(missed or spent.peak_mib >= LIMIT_MIB)


def _compare(home: Path) -> tuple[Spent, Spent]:
    """Export the tables by both, in turn. Return what both spent."""
    tables, ours, rows = _export(home, "--normalized")
    peer, peer_rows = copy_tables(home, tables, home / "duckdb")
    print(f"{len(tables)} tables, {rows:,} rows\n  ours    {ours}\n  DuckDB  {peer}", flush=True)
    if peer_rows != rows or not rows:
        raise SystemExit(f"the rows differ, {rows} and {peer_rows}: there is nothing to measure")
    return ours, peer


def _export(home: Path, *options: str) -> tuple[list[str], Spent, int]:
    """Return the exported tables, what it spent, and the exported rows."""
    out = home / "out"
    settings = {"FHIR_ASSETS_HOME": str(home), "FHIR_PARTITION": "monthly"}
    command = [sys.executable, "-c", _PROGRAM, "export", "Observation", "-o", str(out), "--json", *options]
    output, spent = run(command, settings, home=home)
    files = json.loads(output)["files"]
    shutil.rmtree(out)
    return sorted(Path(file["name"]).stem for file in files), spent, sum(file["rows"] for file in files)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("observations", type=int, nargs="?", default=COUNT)
    sys.exit(main(parser.parse_args().observations))
