"""NDJSON to loaded tables through a Dagster run, beside ``dlt`` with the same files and the same Postgres.

``python -m benchmarks.end_to_end [resources]``. Ours reads, keeps the raw bytes, validates with
all rules, makes the tables of all views, keeps the JSON and reconciles; dlt flattens and merges (nesting 2).
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
            each = seconds / ours.resources * 1e6
            print(f"  {part:<28}{seconds:>8.1f} s {each:>8.0f} us a resource {seconds / ours.seconds:>6.0%}")
        print(f"{'fhir_assets':<30}{ours.seconds:>8.1f} s {ours.rate:>8,.0f} resources/s")
        gc.collect()
        gc.freeze()
        seconds = _dlt(home, source)
        print(f"{'dlt, no validation':<30}{seconds:>8.1f} s {written / seconds:>8,.0f} resources/s")
        print(f"ratio {ours.rate / (written / seconds):.1f}")


def _dlt(home: Path, source: Path) -> float:
    """Seconds that dlt takes: extract, normalize, load, merge by id."""
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
    # A call, not a decorator: the types hold whether dlt is installed or not.
    pipeline.run(dlt.source(files, max_table_nesting=_NESTING)()).raise_on_failed_jobs()
    return perf_counter() - started


def _read(path: Path, batch: int = 1000) -> Iterator[list[Any]]:
    held = []
    with gzip.open(path) as lines:
        for line in lines:
            held.append(orjson.loads(line))
            if len(held) == batch:
                yield held
                held = []
    yield held


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("resources", type=int, nargs="?", default=RESOURCES)
    main(parser.parse_args().resources)
