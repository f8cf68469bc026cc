"""Measure a load from NDJSON to tables through a Dagster run, compared with ``dlt`` on the same files and Postgres.

``python -m benchmarks.end_to_end [resources]``. fhir_assets reads, stores the raw bytes, validates with all rules,
fills the tables of all views, stores the JSON and reconciles; dlt flattens (nesting 2) and merges.
"""

import argparse
import gc
import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import orjson

from benchmarks import population
from benchmarks.deployment import load
from benchmarks.machine import scratch
from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets.warehouse.postgres.db.connections import ensure_database

RESOURCES = 100_000
_NESTING = 2


def main(resources: int = RESOURCES) -> None:
    """Print the table."""
    with scratch() as home:
        source = home / "input"
        source.mkdir()
        written = population.write(source, resources)
        size = sum(path.stat().st_size for path in source.iterdir()) / 2**20
        print(f"{written:,} resources of {len(list(source.glob('*.ndjson.gz')))} types, {size:.0f} MiB of .ndjson.gz")
        ours = load(home, source)
        for part, seconds in ours.parts.items():
            microseconds = seconds / ours.resources * 1e6
            print(f"  {part:<28}{seconds:>8.1f} s {microseconds:>8.0f} us per resource {seconds / ours.seconds:>6.0%}")
        print(f"{'fhir_assets':<30}{ours.seconds:>8.1f} s {ours.rate:>8,.0f} resources/s")
        gc.collect()
        gc.freeze()
        seconds = _dlt(home, source)
        print(f"{'dlt, no validation':<30}{seconds:>8.1f} s {written / seconds:>8,.0f} resources/s")
        print(f"ratio {ours.rate / (written / seconds):.1f}")


def _dlt(home: Path, source: Path) -> float:
    """Return the seconds that dlt takes to extract, normalize, load and merge by id."""
    os.environ["RUNTIME__DLTHUB_TELEMETRY"] = "false"
    import dlt

    url = embedded.ensure(home)
    ensure_database(url, "dlt")
    socket = parse_qs(urlsplit(url).query)["host"][0]
    credentials = {"database": "dlt", "username": "postgres", "password": "-", "host": quote(socket, safe="")}
    pipeline = dlt.pipeline(
        "benchmark",
        pipelines_dir=str(home / "dlt"),
        destination=dlt.destinations.postgres(credentials=credentials),
        dataset_name="fhir",
    )

    def files() -> Iterator[Any]:
        for path in sorted(source.glob("*.ndjson.gz")):
            yield dlt.resource(
                _read(path), name=path.name.partition(".")[0], primary_key="id", write_disposition="merge"
            )

    started = perf_counter()
    # A call, not a decorator, so that mypy gives the same result whether dlt is installed or not.
    pipeline.run(dlt.source(files, max_table_nesting=_NESTING)()).raise_on_failed_jobs()
    return perf_counter() - started


def _read(path: Path, batch: int = 1000) -> Iterator[list[Any]]:
    records: list[Any] = []
    with gzip.open(path) as lines:
        for line in lines:
            records.append(orjson.loads(line))
            if len(records) == batch:
                yield records
                records = []
    yield records


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("resources", type=int, nargs="?", default=RESOURCES)
    main(parser.parse_args().resources)
