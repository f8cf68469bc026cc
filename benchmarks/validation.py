"""Measure validation with all rules, compared with fhir.resources in the same process.

::

    python -m benchmarks.validation [FOLDER_OF_NDJSON]

The default folder is the shared Synthea population, or the sandbox's population where it does not exist.

Each round measures the processor time of both on the same resources, one after the other; the figures are the best of
the rounds. Goals: 15 times the speed of fhir.resources over all types, 10 times for each type with 100 or more
resources.
"""

import gzip
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.population import sample
from fhir_assets.fhir.validation import Validator

ROUNDS = 3
MANY_RESOURCES = 100


def measure_seconds(check: Callable[[bytes], object], bodies: list[bytes]) -> float:
    """Return the processor seconds of checking all bodies. Elapsed time would depend on other work of the machine."""
    start = time.process_time()
    for body in bodies:
        check(body)
    return time.process_time() - start


def main(folder: Path) -> None:
    """Print the table."""
    validator = Validator()
    total = total_other = size = count = invalid = 0.0
    ratios = {}
    print(f"{'type':24}{'resources':>10}{'first ms':>10}{'us':>9}{'MB/s':>8}{'fhir.resources us':>19}{'times':>8}")
    for file in sorted(folder.glob("*.ndjson.gz")):
        name = file.name.partition(".")[0]
        bodies = [line for line in gzip.decompress(file.read_bytes()).splitlines() if line]
        model = getattr(importlib.import_module(f"fhir.resources.R4B.{name.lower()}"), name)
        first = measure_seconds(validator.check, bodies[:1])
        invalid += sum(not validator.check(body).valid for body in bodies)
        measure_seconds(model.model_validate_json, bodies[:1])
        ours, other = float("inf"), float("inf")
        for _ in range(ROUNDS):
            ours = min(ours, measure_seconds(validator.check, bodies))
            other = min(other, measure_seconds(model.model_validate_json, bodies))
        body_bytes = sum(map(len, bodies))
        times = other / ours
        print(
            f"{name:24}{len(bodies):10}{first * 1e3:10.1f}{ours / len(bodies) * 1e6:9.1f}{body_bytes / ours / 1e6:8.1f}"
            f"{other / len(bodies) * 1e6:19.1f}{times:8.1f}"
        )
        if len(bodies) >= MANY_RESOURCES:
            ratios[name] = times
        total, total_other, size, count = total + ours, total_other + other, size + body_bytes, count + len(bodies)
    print(
        f"{'all':24}{count:10.0f}{'':10}{total / count * 1e6:9.1f}{size / total / 1e6:8.1f}"
        f"{total_other / count * 1e6:19.1f}{total_other / total:8.1f}"
    )
    lowest = min(ratios, key=ratios.__getitem__, default="none")
    print(
        f"invalid: {invalid:.0f}; lowest of the types with {MANY_RESOURCES} or more:"
        f" {lowest} {ratios.get(lowest, 0):.1f}"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with sample() as folder:
            main(folder)
