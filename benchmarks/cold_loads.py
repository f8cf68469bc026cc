"""Measure loads by processes that start cold: ``python -m benchmarks.cold_loads [resources]``.

``fhir-assets ingest`` with its default settings and the peer of ``benchmarks.peer`` load the same folder of five types
over 91 days into the same embedded Postgres, in turn; then `ingest` runs again, with nothing due. CPU is that of the
process, its children and Postgres.
"""

import argparse
import gzip
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import perf_counter

import orjson

from benchmarks.machine import cpu_seconds, scratch
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

_INGEST = "from fhir_assets.cli import main; main()"


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds and CPU seconds of one process."""

    seconds: float
    processor: float

    def __str__(self) -> str:
        return f"{self.seconds:>7.2f} s {self.processor:>7.2f} s CPU"


def main(resources: int = RESOURCES, rounds: int = ROUNDS) -> int:
    """Print the table. Return 1 if a goal is missed."""
    print(f"load {os.getloadavg()[0]:.1f}")
    ratios = [_compare(resources) for _ in range(rounds)]
    goal = GOALS.get(resources, 0.0)
    best = sorted(ratios)[len(ratios) // 2]
    print(f"median ratio with {PARTITIONS[0]} windows {best:.2f} (goal {goal})")
    return int(best < goal)


def _compare(resources: int) -> float:
    """Load by all, each into a database of its own; return the peer's seconds as a multiple of ours."""
    with scratch() as folder:
        source = folder / "input"
        written = write(source, resources)
        taken = {}
        for name in PARTITIONS:
            home = folder / name
            settings = _settings(home, source, name)
            embedded.ensure(home)
            _run(home, [sys.executable, "-c", _INGEST, "migrate"], settings)
            taken[name] = _run(home, [sys.executable, "-c", _INGEST, "ingest"], settings)
            print(f"{written:,} resources, {name:<9} {taken[name]}")
            print(f"  nothing due       {_run(home, [sys.executable, '-c', _INGEST, 'ingest'], settings)}")
            embedded.stop(home)
        home = folder / "peer"
        embedded.ensure(home)
        peer = _run(home, [sys.executable, "-m", "benchmarks.peer", str(source), str(home)], {})
        print(f"{written:,} resources, dlt       {peer}", flush=True)
        embedded.stop(home)
    return peer.seconds / taken[PARTITIONS[0]].seconds


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


def _run(home: Path, command: list[str], settings: dict[str, str]) -> Spent:
    """Run a command in a process of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FHIR_", "DB_", "DAGSTER"))}
    before, started = cpu_seconds(home), perf_counter()
    subprocess.run(command, env={**inherited, **settings}, stdout=subprocess.DEVNULL, check=True)
    return Spent(perf_counter() - started, cpu_seconds(home) - before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("resources", type=int, nargs="?", default=RESOURCES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    sys.exit(main(arguments.resources, arguments.rounds))
