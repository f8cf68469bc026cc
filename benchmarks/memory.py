"""Measure the peak memory of loading one window, which must not grow with the window.

``python -m benchmarks.memory [observations ...]`` loads each number of Observations, all in one monthly window, by a
Dagster run in a process of its own. The peak is the peak of this process, without Postgres.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import population
from benchmarks.deployment import load
from benchmarks.figures import Figure, report
from benchmarks.machine import peak_mib, scratch

COUNTS = (500_000, 1_000_000)
LIMIT_MIB = 400
GOAL_MIB = 260.0
"""The most for a million Observations."""


def main(counts: tuple[int, ...] = COUNTS) -> int:
    """Print the table. Return 1 if a peak exceeds the limit or the goal."""
    peaks = []
    for count in counts:
        with scratch() as home:
            source = home / "Observation.ndjson.gz"
            population.write_observations(source, count)
            figures = _run_process(home, source)
        peaks.append(figures["peak_mib"])
        print(
            f"{count:>12,} Observations, one window {figures['peak_mib']:>6.0f} MiB"
            f" {figures['rate']:>8,.0f} resources/s"
        )
    over = max(peaks) >= LIMIT_MIB
    print(f"limit {LIMIT_MIB} MiB: {'exceeded' if over else 'kept'}; largest : smallest {max(peaks) / min(peaks):.2f}")
    missed = report(Figure(8, f"memory, {max(counts):,} Observations in one window", max(peaks), GOAL_MIB, " MiB"))
    return int(over or missed)


def _run_process(home: Path, source: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", __name__ if __name__ != "__main__" else __spec__.name, "--load", home, source],
        stdout=subprocess.PIPE,
        check=True,
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _load(home: Path, source: Path) -> None:
    """Load in this process and print the figures as JSON."""
    done = load(home, source, fhir_resource_types="Observation")
    print(json.dumps({"peak_mib": peak_mib(), "rate": done.rate, "resources": done.resources}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("observations", type=int, nargs="*", default=COUNTS)
    parser.add_argument("--load", type=Path, nargs=2, metavar=("HOME", "SOURCE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        _load(*arguments.load)
    else:
        sys.exit(main(tuple(arguments.observations)))
