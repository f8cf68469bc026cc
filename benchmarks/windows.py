"""Measure the load of nearly empty windows, and of one empty window.

``python -m benchmarks.windows [windows]`` loads daily windows of all types by search. Every tenth day has one resource.
The runs load FHIR_WINDOWS_PER_RUN windows each, one after another, as ``fhir-assets ingest`` does. CPU is the time of
the loading process and of its Postgres, without the sandbox server. ``--storage stock`` measures with the storage
of dagster-postgres.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from benchmarks.deployment import Storage, deployed
from benchmarks.loader import START, observation
from benchmarks.machine import scratch
from benchmarks.meter import Cost, Meter
from fhir_assets.ingestion.outcome import select_failed
from fhir_assets.ingestion.runs import Ingestion
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxProcess
from fhir_assets.settings import SourceKind
from fhir_assets.windows import Granularity, WindowRange

WINDOWS = 1000
LIMIT_SECONDS = 180.0
"""The limit for ``WINDOWS`` windows."""

LIMIT_EMPTY_SECONDS = 5.0
_DAY = timedelta(days=1)
DAYS_PER_RESOURCE = 10
_ROUNDS = 3


def main(count: int = WINDOWS, storage: Storage = Storage.OWN) -> int:
    """Print the table. Return 1 if a duration exceeds its limit, scaled to the number of windows."""
    load = os.getloadavg()[0]
    with scratch() as home, SandboxProcess(write_nearly_empty(home / "data", count)) as server:
        total, empty = _measure(home, server, count, storage)
    seconds = total.seconds * WINDOWS / count
    print(f"{count:,} windows at load {load:.1f}, scaled to {WINDOWS:,}: {seconds:.0f} s (limit {LIMIT_SECONDS:.0f} s)")
    print(f"an empty window: {empty:.1f} s (limit {LIMIT_EMPTY_SECONDS:.0f} s)")
    return int(seconds > LIMIT_SECONDS or empty > LIMIT_EMPTY_SECONDS)


def write_nearly_empty(folder: Path, days: int, days_per_resource: int = DAYS_PER_RESOURCE) -> Path:
    """Write an Observation of every tenth day, or another number of days, to a folder and return it."""
    folder.mkdir()
    bodies = [observation(day * 86_400).body for day in range(0, days, days_per_resource)]
    (folder / "Observation.ndjson").write_bytes(b"\n".join([*bodies, b""]))
    return folder


def _measure(home: Path, server: SandboxProcess, count: int, storage: Storage) -> tuple[Cost, float]:
    """Return the cost of all windows, and the seconds of an empty window, the best of some rounds."""
    with deployed(home, storage, **search_settings(server)) as (ingestion, _):
        meter = Meter(home, excluded=server.pid)
        end = START + (count - 1) * _DAY
        find = ingestion.due_loads.find
        total = sum(
            (measure_run(ingestion, meter, windows) for windows in ingestion.due_loads.find(first=START, last=end)),
            Cost(),
        )
        print(format_cost(f"all {count:,}", total))
        later = [end + number * _DAY for number in range(1, _ROUNDS + 1)]
        empty = [measure_run(ingestion, meter, windows) for day in later for windows in find(first=day, last=day)]
        best = min(empty, key=lambda cost: cost.seconds)
        print(format_cost("an empty window", best))
        return total, best.seconds


def search_settings(server: SandboxProcess) -> Mapping[str, object]:
    """Return the settings for daily windows of all types by search."""
    return {
        "fhir_base_url": server.url,
        "fhir_source": SourceKind.SEARCH,
        "fhir_partition": Granularity.DAILY,
        "fhir_last_updated_gte": START,
    }


def measure_run(ingestion: Ingestion, meter: Meter, windows: WindowRange) -> Cost:
    """Load a range of windows in one run and return the cost, from the request to its success."""
    name = windows.windows[0].key
    with meter.measure_part(name):
        outcome = ingestion.load(windows, refresh=Refresh.MISSING, triggered_by="benchmark")
    if select_failed([outcome]):
        raise SystemExit("a run failed: there is nothing to measure")
    if len(windows.windows) > 1:
        print(format_cost(f"{len(windows.windows)} windows from {name}", meter.parts[name]), flush=True)
    return meter.parts[name]


def format_cost(title: str, cost: Cost) -> str:
    """Return a line with the cost."""
    return f"{title:<32}{cost.seconds:>8.1f} s, CPU {cost.load:>7.1f} s, CPU of Postgres {cost.postgres:>6.1f} s"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("windows", type=int, nargs="?", default=WINDOWS)
    parser.add_argument("--storage", type=Storage, choices=list(Storage), default=Storage.OWN)
    arguments = parser.parse_args()
    sys.exit(main(arguments.windows, arguments.storage))
