"""How fast the synthetic population is made and served: ``python -m benchmarks.generator``.

The sandbox must never be the bottleneck of a load: both figures want to be above 20,000 resources/s.
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


def _timed(what: str, work: Callable[[], int]) -> int:
    start = time.perf_counter()
    count = work()
    seconds = time.perf_counter() - start
    print(f"{what:<44}{count:>10,} resources {seconds:>7.2f} s {count / seconds:>10,.0f}/s")
    return count


def _search(url: str, resource_type: str) -> int:
    """Page through a type without parsing what comes: the server's speed, not the client's."""
    session = requests.Session()
    page, count = f"{url}/{resource_type}?_count=1000&_sort=_lastUpdated", 0
    while page:
        body = session.get(page, timeout=60).content
        count += body.count(b'"mode":"match"')
        place = body.find(_NEXT, 0, 2000)
        page = body[place + len(_NEXT) :].split(b'"', 1)[0].decode() if place > 0 else ""
    return count


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--patients", type=int, default=2000)
    patients = parser.parse_args().patients
    _timed("generated", lambda: sum(1 for _ in Population(patients)))
    _timed("generated, 2 % bad", lambda: sum(1 for _ in Population(patients, bad_share=0.02)))
    with tempfile.TemporaryDirectory() as folder:
        _timed(
            "generated and written as .ndjson.gz",
            lambda: write_population(Path(folder), Population(patients)).resources.total(),
        )
        with SandboxProcess(Path(folder)) as server:
            _timed("served by search, pages of 1,000", lambda: sum(_search(server.url, t.name) for t in CATALOG))


if __name__ == "__main__":
    main()
