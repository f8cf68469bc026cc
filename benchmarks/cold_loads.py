"""Measure loads by processes that start cold: ``python -m benchmarks.cold_loads [resources]``.

``fhir-assets ingest`` with its default settings and the peer of ``benchmarks.peer`` load the same folder of five types
over 91 days into the same embedded Postgres, in turn; then `ingest` runs again, with nothing due. CPU is that of the
process, its children and Postgres.
"""

import argparse
import gzip
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson

from benchmarks.figures import Figure, report
from benchmarks.machine import scratch
from benchmarks.processes import Spent, run
from fhir_assets.sandbox.population import Population
from fhir_assets.warehouse.postgres.db import embedded

RESOURCES = 18_000
TYPES = ("Condition", "Encounter", "MedicationRequest", "Observation", "Patient")
END = datetime(2024, 4, 1, tzinfo=UTC)
DAYS = 91
PARTITIONS = ("daily", "monthly")
ROUNDS = 3
GOALS = {18_000: 1.5, 180_000: 4.0}
"""The least ratio of the peer's seconds to ours, by resources, with the default windows."""

NOTHING_DUE = "nothing due"
_PROGRAM = "from fhir_assets.cli import main; main()"


def main(resources: int = RESOURCES, rounds: int = ROUNDS) -> int:
    """Print the table. Return 1 if a goal is missed."""
    print(f"load {os.getloadavg()[0]:.1f}")
    measured = [_compare(resources) for _ in range(rounds)]
    measured.sort(key=lambda spent: spent["dlt"].seconds / spent[PARTITIONS[0]].seconds)
    spent = measured[len(measured) // 2]
    figures = [
        Figure(
            1,
            f"{resources:,} resources, cold ingest, {name} windows",
            spent["dlt"].seconds / spent[name].seconds,
            GOALS.get(resources) if name == PARTITIONS[0] else None,
            " times dlt",
            True,
            spent[name],
            spent["dlt"],
            "dlt",
        )
        for name in PARTITIONS
    ]
    idle = spent[NOTHING_DUE]
    return report(*figures, Figure(2, "ingest with nothing due, cold", idle.processor, None, " s CPU", ours=idle))


def _compare(resources: int) -> dict[str, Spent]:
    """Load by all, each into a database of its own. Return what each spent."""
    with scratch() as folder:
        source = folder / "input"
        written = write(source, resources)
        spent = {}
        for name in PARTITIONS:
            home = folder / name
            spent[name] = load_cold(home, source, partition=name)
            print(f"{written:,} resources, {name:<12} {spent[name]}")
            spent[NOTHING_DUE] = _ingest(home, source, name)
            print(f"  {NOTHING_DUE:<28} {spent[NOTHING_DUE]}")
            embedded.stop(home)
        spent["dlt"] = load_cold_peer(folder / "peer", source)
        print(f"{written:,} resources, dlt          {spent['dlt']}", flush=True)
        embedded.stop(folder / "peer")
    return spent


def load_cold(home: Path, source: Path, *, partition: str = PARTITIONS[0]) -> Spent:
    """Load a folder by ``fhir-assets ingest`` into a new deployment, whose Postgres runs and is migrated."""
    embedded.ensure(home)
    run([sys.executable, "-c", _PROGRAM, "migrate"], _settings(home, source, partition))
    return _ingest(home, source, partition)


def load_cold_peer(home: Path, source: Path) -> Spent:
    """Load a folder by dlt into a new Postgres that runs."""
    embedded.ensure(home)
    return run([sys.executable, "-m", "benchmarks.peer", str(source), str(home)], home=home)[1]


def _ingest(home: Path, source: Path, partition: str) -> Spent:
    return run([sys.executable, "-c", _PROGRAM, "ingest"], _settings(home, source, partition), home=home)[1]


def write(folder: Path, resources: int) -> int:
    """Write ``<Type>.ndjson.gz`` of the types until they have so many resources. Return their number."""
    folder.mkdir()
    lines: dict[str, list[bytes]] = {name: [] for name in TYPES}
    count = 0
    for item in Population(resources, end=END, start=END - timedelta(days=DAYS)):
        if item.resource_type in lines:
            lines[item.resource_type].append(item.body)
            count += 1
        if count >= resources:
            break
    for name, bodies in lines.items():
        content = b"\n".join([*(orjson.dumps(orjson.loads(body)) for body in bodies), b""])
        (folder / f"{name}.ndjson.gz").write_bytes(gzip.compress(content, 1))
    return count


def _settings(home: Path, source: Path, partition: str) -> dict[str, str]:
    return {
        "FHIR_ASSETS_HOME": str(home),
        "FHIR_BASE_URL": str(source),
        "FHIR_SOURCE": "ndjson",
        "FHIR_PARTITION": partition,
        "FHIR_RESOURCE_TYPES": ",".join(TYPES),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("resources", type=int, nargs="?", default=RESOURCES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    sys.exit(main(arguments.resources, arguments.rounds))
