"""Measure ``fhir-assets reconcile --deep``, which compares the id and version of every resource of the source.

``python -m benchmarks.deep_reconcile [observations]`` loads that many Observations of a folder. CPU is that of the
command, in a process of its own, and of Postgres. It is judged from a million resources on: of fewer, too much of it
is the start of the process.
"""

import argparse
import json
import sys

from benchmarks import population
from benchmarks.deployment import load
from benchmarks.figures import Figure, report
from benchmarks.machine import scratch
from benchmarks.processes import run

COUNT = 1_000_000
GOAL_SECONDS = 30.0
"""The most CPU seconds for a million resources."""
GOAL_MIB = 200.0
"""The most memory for any number of resources."""

_PROGRAM = "from fhir_assets.cli import main; main()"


def main(count: int = COUNT) -> int:
    """Print the figures. Return 1 if a goal is missed."""
    with scratch() as home:
        source = home / "Observation.ndjson.gz"
        population.write_observations(source, count)
        done = load(home, source, fhir_resource_types="Observation")
        settings = {
            "FHIR_ASSETS_HOME": str(home),
            "FHIR_BASE_URL": str(source),
            "FHIR_SOURCE": "ndjson",
            "FHIR_PARTITION": "monthly",
            "FHIR_RESOURCE_TYPES": "Observation",
        }
        command = [sys.executable, "-c", _PROGRAM, "reconcile", "--deep", "--json"]
        output, spent = run(command, settings, home=home)
    [compared] = json.loads(output)["types"]
    if not compared["source"] == done.resources == count:
        raise SystemExit("not all resources were compared: there is nothing to measure")
    print(f"{count:,} Observations compared: {spent}")
    work = f"reconcile --deep of {count:,} resources"
    million = spent.processor * COUNT / count
    goal = GOAL_SECONDS if count >= COUNT else None
    return report(
        Figure(6, f"{work}, CPU of a million", million, goal, " s", ours=spent),
        Figure(6, f"{work}, memory", spent.peak_mib, GOAL_MIB, " MiB", ours=spent),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("observations", type=int, nargs="?", default=COUNT)
    sys.exit(main(parser.parse_args().observations))
