"""What a load costs with one worker process and with two: seconds by layer, bytes in the store and in Postgres.

``python -m fhir_assets_tests.benchmarks.scale [resources]`` prints a table, all of it for a million resources.
"""

import os
import sys
from pathlib import Path

from fhir_assets.warehouse import embedded
from fhir_assets.warehouse.database import connect
from fhir_assets_tests.benchmarks import population
from fhir_assets_tests.benchmarks.deployment import load
from fhir_assets_tests.benchmarks.machine import scratch

RESOURCES = 100_000
COUNTS = (1, 2)


def main(resources: int = RESOURCES) -> None:
    """Print the table."""
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    rates = []
    for count in COUNTS:
        with scratch() as home:
            source = home / "input"
            source.mkdir()
            population.write(source, resources)
            done = load(home, source, fhir_workers=count)
            rates.append(done.rate)
            million = 1_000_000 / done.resources
            print(f"\nFHIR_WORKERS={count}: {done.rate:,.0f} resources/s; for a million resources:")
            for part, seconds in done.parts.items():
                print(f"  {part:<28}{seconds * million:>10,.0f} s")
            for place, size in _bytes(home).items():
                print(f"  {place:<28}{size * million / 2**20:>10,.0f} MiB")
    print(f"\n{COUNTS[1]} workers : {COUNTS[0]} worker = {rates[1] / rates[0]:.2f}")


def _bytes(home: Path) -> dict[str, int]:
    sizes = {}
    for layer in ("raw", "validated"):
        files = (home / "store" / layer).rglob("*")
        sizes[f"store, {layer}"] = sum(path.stat().st_size for path in files if path.is_file())
    for title, database in (("Postgres, tables", None), ("Postgres, Dagster's storage", embedded.DAGSTER_DATABASE)):
        url = embedded.ensure(home, database) if database else embedded.ensure(home)
        with connect(url) as conn:
            (sizes[title],) = conn.execute("SELECT pg_database_size(current_database())").fetchone() or (0,)
    return sizes


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else RESOURCES)
