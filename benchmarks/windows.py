"""What a backfill of nearly empty windows costs, and an empty window by itself.

``python -m benchmarks.windows [windows]`` loads daily windows of all types by search, a resource
every tenth day, in runs of FHIR_WINDOWS_PER_RUN after one another, as ``fhir-assets ingest`` does. CPU is that of the
process that loads and that of its Postgres, without the sandbox which serves the resources.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

from benchmarks.deployment import deployed
from benchmarks.loader import START, observation
from benchmarks.machine import scratch
from benchmarks.meter import Cost, Meter
from fhir_assets.ingestion import Ingestion, select_failed
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxProcess
from fhir_assets.settings import SourceKind
from fhir_assets.windows import Granularity, WindowRange

WINDOWS = 1000
LIMIT_SECONDS = 180.0
"""Of so many windows."""

LIMIT_EMPTY_SECONDS = 5.0
_DAY = timedelta(days=1)
EVERY = 10
_ROUNDS = 3


def main(count: int = WINDOWS) -> int:
    """Print the table; 1 if it took longer than the limits, in proportion, allow."""
    load = os.getloadavg()[0]
    with scratch() as home, SandboxProcess(nearly_empty(home / "data", count)) as server:
        whole, empty = _measured(home, server, count)
    seconds = whole.seconds * WINDOWS / count
    print(
        f"{count:,} windows at load {load:.1f}, so {WINDOWS:,} of them: {seconds:.0f} s (limit {LIMIT_SECONDS:.0f} s)"
    )
    print(f"an empty window: {empty:.1f} s (limit {LIMIT_EMPTY_SECONDS:.0f} s)")
    return int(seconds > LIMIT_SECONDS or empty > LIMIT_EMPTY_SECONDS)


def nearly_empty(folder: Path, days: int) -> Path:
    """A folder with an Observation of every tenth day."""
    folder.mkdir()
    bodies = [observation(day * 86_400).body for day in range(0, days, EVERY)]
    (folder / "Observation.ndjson").write_bytes(b"\n".join([*bodies, b""]))
    return folder


def _measured(home: Path, server: SandboxProcess, count: int) -> tuple[Cost, float]:
    """What all the windows cost; the seconds of an empty one, best of some."""
    settings = {
        "fhir_base_url": server.url,
        "fhir_source": SourceKind.SEARCH,
        "fhir_partition": Granularity.DAILY,
        "fhir_last_updated_gte": START,
    }
    with deployed(home, **settings) as (ingestion, _):
        meter = Meter(home, apart=server.pid)
        end = START + (count - 1) * _DAY
        whole = sum((_cost(ingestion, meter, windows) for windows in ingestion.find_due(first=START, last=end)), Cost())
        print(_said(f"all {count:,}", whole))
        later = [end + number * _DAY for number in range(1, _ROUNDS + 1)]
        empty = [
            _cost(ingestion, meter, windows) for day in later for windows in ingestion.find_due(first=day, last=day)
        ]
        best = min(empty, key=lambda cost: cost.seconds)
        print(_said("an empty one", best))
        return whole, best.seconds


def _cost(ingestion: Ingestion, meter: Meter, windows: WindowRange) -> Cost:
    """What one run costs, from the request to its success."""
    name = windows.windows[0].key
    with meter.part(name):
        outcome = ingestion.load(windows, refresh=Refresh.MISSING, triggered_by="benchmark")
    if select_failed([outcome]):
        raise SystemExit("a run failed: the figures would say nothing")
    if len(windows.windows) > 1:
        print(_said(f"{len(windows.windows)} windows from {name}", meter.parts[name]), flush=True)
    return meter.parts[name]


def _said(what: str, cost: Cost) -> str:
    return f"{what:<32}{cost.seconds:>8.1f} s, CPU {cost.load:>7.1f} s, of Postgres {cost.postgres:>6.1f} s"


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else WINDOWS))
