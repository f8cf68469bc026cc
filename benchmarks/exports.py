"""Measure the peak memory of an export, which must not grow with the number of resources.

``python -m benchmarks.exports [observations]`` loads that many Observations. ``fhir-assets export`` then exports the
valid resources and the tables as Parquet, in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from benchmarks import population
from benchmarks.deployment import load
from benchmarks.machine import scratch

COUNT = 1_000_000
LIMIT_MIB = 300
_PROCESS = """
import sys
from fhir_assets.cli.main import app
from benchmarks.machine import peak_mib
app(sys.argv[1:], standalone_mode=False)
print(peak_mib(), file=sys.stderr)
"""


def main(count: int = COUNT) -> None:
    """Print the figures. Exit with 1 if the peak exceeds the limit."""
    with scratch() as home:
        source = home / "Observation.ndjson.gz"
        population.write_observations(source, count)
        load(home, source, fhir_resource_types="Observation")
        started = perf_counter()
        peak, rows = _export(home)
        seconds = perf_counter() - started
    print(f"{count:>12,} Observations, valid and 6 tables {peak:>6.0f} MiB {rows / seconds:>10,.0f} rows/s")
    print(f"limit {LIMIT_MIB} MiB: {'exceeded' if peak >= LIMIT_MIB else 'kept'}")
    if peak >= LIMIT_MIB:
        raise SystemExit(1)


def _export(home: Path) -> tuple[float, int]:
    environment = {**os.environ, "FHIR_ASSETS_HOME": str(home), "FHIR_PARTITION": "monthly"}
    for name in ("DB_URL", "DAGSTER_HOME", "DAGSTER_POSTGRES_URL"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, "export", "Observation", "-o", str(home / "out"), "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    files = json.loads(done.stdout)["files"]
    return float(done.stderr.split()[-1]), sum(file["rows"] for file in files)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("observations", type=int, nargs="?", default=COUNT)
    main(parser.parse_args().observations)
