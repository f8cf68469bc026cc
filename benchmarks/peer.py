"""The load of a folder of NDJSON into Postgres by dlt, without validation: ``python -m benchmarks.peer FOLDER HOME``.

``HOME`` has an embedded Postgres, as a deployment has. It prints the seconds of the load, without the imports.
"""

import argparse
import gzip
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import orjson

from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets.warehouse.postgres.db.connections import ensure_database

_NESTING = 2
_BATCH = 1000


def load(home: Path, source: Path) -> None:
    """Extract, normalize, load and merge by id each ``<Type>.ndjson.gz`` of ``source``."""
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

    # A call, not a decorator, so that mypy gives the same result whether dlt is installed or not.
    pipeline.run(dlt.source(files, max_table_nesting=_NESTING)()).raise_on_failed_jobs()


def _read(path: Path) -> Iterator[list[Any]]:
    records: list[Any] = []
    with gzip.open(path) as lines:
        for line in lines:
            records.append(orjson.loads(line))
            if len(records) == _BATCH:
                yield records
                records = []
    yield records


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("home", type=Path)
    arguments = parser.parse_args()
    importlib.import_module("dlt")
    started = perf_counter()
    load(arguments.home, arguments.folder)
    print(perf_counter() - started)
