"""Measure how fast the synthetic population is generated and served: ``python -m benchmarks.generator``.

The sandbox must not be the bottleneck of a load: both figures should exceed 20,000 resources/s.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import requests

from fhir_assets.catalog import CATALOG
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxProcess

_NEXT = b'"relation":"next","url":"'


def _measure(title: str, work: Callable[[], int]) -> int:
    start = time.perf_counter()
    count = work()
    seconds = time.perf_counter() - start
    print(f"{title:<44}{count:>10,} resources {seconds:>7.2f} s {count / seconds:>10,.0f}/s")
    return count


def _search(url: str, resource_type: str) -> int:
    """Page through a type without parsing the pages, so that the client's speed does not count. Return the matches."""
    session = requests.Session()
    page, count = f"{url}/{resource_type}?_count=1000&_sort=_lastUpdated", 0
    while page:
        body = session.get(page, timeout=60).content
        count += body.count(b'"mode":"match"')
        position = body.find(_NEXT, 0, 2000)
        page = body[position + len(_NEXT) :].split(b'"', 1)[0].decode() if position > 0 else ""
    return count


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--patients", type=int, default=2000)
    patients = parser.parse_args().patients
    _measure("generated", lambda: sum(1 for _ in Population(patients)))
    _measure("generated, 2 % with defects", lambda: sum(1 for _ in Population(patients, bad_share=0.02)))
    with tempfile.TemporaryDirectory() as folder:
        _measure(
            "generated and written as .ndjson.gz",
            lambda: write_population(Path(folder), Population(patients)).resources.total(),
        )
        with SandboxProcess(Path(folder)) as server:
            _measure("served by search, pages of 1,000", lambda: sum(_search(server.url, t.name) for t in CATALOG))


if __name__ == "__main__":
    main()
