"""Measure key rotation: its speed compared with a load, and its peak memory, which must not grow with the table.

``python -m benchmarks.rotation [observations ...]`` loads each number of Observations with one key, then rotates to
another in a process of its own. The peak is the peak of this process, without Postgres.
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
from benchmarks.machine import peak_mib, scratch
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.pipeline.reencrypt.step import ReencryptStep
from fhir_assets.privacy.keys import new_key
from fhir_assets.settings import load_settings

COUNTS = (25_000, 100_000)
LIMIT_MIB = 250
LIMIT_GROWTH = 1.15


def main(counts: tuple[int, ...] = COUNTS) -> None:
    """Print the table. Exit with 1 if a limit is exceeded."""
    peaks = []
    for count in counts:
        old, new = new_key(), new_key()
        with scratch() as home:
            source = home / "Observation.ndjson.gz"
            population.write_observations(source, count)
            loaded = load(home, source, fhir_resource_types="Observation", phi_encryption_keys=old)
            figures = _run_process(home, f"{new},{old}")
        peaks.append(figures["peak_mib"])
        rate = figures["resources"] / figures["seconds"]
        print(
            f"{count:>12,} Observations rotated {figures['peak_mib']:>6.0f} MiB {rate:>8,.0f} resources/s,"
            f" loaded {loaded.rate:>8,.0f} resources/s, not rotated {figures['left_over']:.0f}"
        )
        if figures["left_over"]:
            raise SystemExit("some resources were not rotated")
    growth = max(peaks) / min(peaks)
    over = max(peaks) > LIMIT_MIB or growth > LIMIT_GROWTH
    print(f"limits {LIMIT_MIB} MiB, growth {LIMIT_GROWTH}: {'exceeded' if over else 'kept'}; ratio {growth:.2f}")
    if over:
        raise SystemExit(1)


def _run_process(home: Path, keys: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", __name__ if __name__ != "__main__" else __spec__.name, "--rotate", home],
        env={**os.environ, "PHI_ENCRYPTION_KEYS": keys},
        stdout=subprocess.PIPE,
        check=True,
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _rotate(home: Path) -> None:
    """Rotate in this process and print the figures as JSON."""
    settings = load_settings(fhir_assets_home=home, db_url=None)
    warehouse, store, views = Warehouse(settings), build_store(settings), build_views(settings).views
    warehouse.url()
    started = perf_counter()
    rotated = ReencryptStep(warehouse.connect, store, views, actor="benchmark").run()
    seconds = perf_counter() - started
    print(
        json.dumps(
            {
                "peak_mib": peak_mib(),
                "seconds": seconds,
                "resources": rotated.encrypted["resources"],
                "left_over": rotated.left_over,
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("observations", type=int, nargs="*", default=COUNTS)
    parser.add_argument("--rotate", type=Path, metavar="HOME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rotate:
        _rotate(arguments.rotate)
    else:
        main(tuple(arguments.observations))
