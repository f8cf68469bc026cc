"""Measure how fast views give rows, compared with ``sqlonfhir`` in the same process on the same resources.

``python -m benchmarks.views [FOLDER]``. FOLDER contains ``<Type>.ndjson.gz``; the default is the shared Synthea
population. The figures are the processor time of the views only: the resources are parsed before.
"""

import argparse
import gzip
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from benchmarks.population import sample
from fhir_assets.fhir.views import CompiledViews, parse_view

ENCOUNTER_FLAT: dict[str, Any] = {
    "resource": "Encounter",
    "select": [
        {
            "column": [
                {"name": "id", "path": "id"},
                {"name": "status", "path": "status"},
                {"name": "class_code", "path": "class.code"},
                {"name": "type_code", "path": "type.coding.code.first()"},
                {"name": "type_text", "path": "type.first().text"},
                {"name": "subject", "path": "subject.reference"},
                {"name": "period_start", "path": "period.start"},
                {"name": "period_end", "path": "period.end"},
                {"name": "provider", "path": "serviceProvider.reference"},
            ]
        }
    ],
}
PATIENT_NAMES: dict[str, Any] = {
    "resource": "Patient",
    "select": [
        {"column": [{"name": "id", "path": "id"}]},
        {
            "forEach": "name",
            "column": [
                {"name": "use", "path": "use"},
                {"name": "family", "path": "family"},
                {"name": "given", "path": "given.first()"},
            ],
        },
    ],
}
OBSERVATION_COMPONENTS: dict[str, Any] = {
    "resource": "Observation",
    "select": [
        {
            "column": [
                {"name": "id", "path": "id"},
                {"name": "code", "path": "code.coding.code.first()"},
                {"name": "value", "path": "value.ofType(Quantity).value"},
            ]
        },
        {
            "forEachOrNull": "component",
            "column": [
                {"name": "component_code", "path": "code.coding.code.first()"},
                {"name": "component_value", "path": "value.ofType(Quantity).value"},
                {"name": "component_unit", "path": "value.ofType(Quantity).unit"},
            ],
        },
    ],
}
_MIN_RESOURCES = 5000
VIEWS = {
    "Encounter, 9 columns flat": ENCOUNTER_FLAT,
    "Patient names by forEach": PATIENT_NAMES,
    "Observation with components": OBSERVATION_COMPONENTS,
}


@dataclass(frozen=True, slots=True)
class Result:
    """Resources per second: ``ours`` of fhir_assets, ``theirs`` of sqlonfhir."""

    view: str
    resources: int
    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """The speed of fhir_assets as a multiple of the speed of sqlonfhir."""
        return self.ours / self.theirs


def read(folder: Path, resource_type: str) -> list[dict[str, Any]]:
    """Return the parsed resources of a type."""
    with gzip.open(folder / f"{resource_type}.ndjson.gz") as lines:
        return [orjson.loads(line) for line in lines]


def _best(work: Callable[[], object], *, seconds: float) -> float:
    """Return the shortest processor time of a run, among at least three and as many as fit into ``seconds``."""
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 3 or spent < seconds:
        start = time.process_time()
        work()
        taken = time.process_time() - start
        best, spent, runs = min(best, taken), spent + taken, runs + 1
    return best


def measure(name: str, folder: Path, *, limit: int = 1000) -> Result:
    """Measure one view. ``sqlonfhir`` gets ``limit`` resources at most, because it is slow."""
    import sqlonfhir

    definition = VIEWS[name]
    resources = read(folder, definition["resource"])
    few = resources[:limit]
    # The resolution of the processor clock is too low for the few microseconds that 25 Patients take.
    resources *= -(-_MIN_RESOURCES // len(resources))
    rows = CompiledViews([parse_view(definition)]).rows
    ours = _best(lambda: [rows(resource) for resource in resources], seconds=1)
    theirs = _best(lambda: sqlonfhir.evaluate(few, definition), seconds=1)
    return Result(name, len(resources), len(resources) / ours, len(few) / theirs)


def main(folder: Path) -> None:
    """Print one line per view."""
    print(f"{'view':32}{'fhir_assets':>14}{'sqlonfhir':>12}{'ratio':>8}   (resources per second)")
    for name in VIEWS:
        result = measure(name, folder)
        print(f"{name:32}{result.ours:14,.0f}{result.theirs:12,.0f}{result.ratio:8.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    if folder := parser.parse_args().folder:
        main(folder)
    else:
        with sample() as folder:
            main(folder)
