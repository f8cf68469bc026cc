"""Measure a fetch by search from a server that answers each request after 50 ms.

``python -m benchmarks.search_fetch [resources]`` loads five types over 91 days, in daily windows, from a sandbox server
that delays every answer. The connections allow FHIR_MAX_CONNECTIONS requests in each 50 ms: the figure is the share of
this that the load reaches while its raw layer fetches. The pages are small, so that the server is the limit and not
the CPU.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path

from benchmarks.cold_loads import DAYS, END, TYPES, write
from benchmarks.deployment import deployed
from benchmarks.figures import Figure, report
from benchmarks.machine import scratch
from benchmarks.meter import Meter
from benchmarks.processes import Spent
from fhir_assets.ingestion.outcome import select_failed
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.faults import Fault, FaultKind, FaultPlan
from fhir_assets.sandbox.process import SandboxProcess
from fhir_assets.settings import SourceKind, load_settings
from fhir_assets.windows import Granularity

RESOURCES = 20_000
GOAL_SHARE = 0.9
"""The least share of the requests that the connections allow."""

_ANSWER_SECONDS = 0.05
_PAGE_SIZE = 100


def main(resources: int = RESOURCES, page_size: int = _PAGE_SIZE) -> int:
    """Print the table. Return 1 if the goal is missed."""
    plan = FaultPlan(faults=(Fault(kind=FaultKind.SLOW, seconds=_ANSWER_SECONDS),))
    with scratch() as home:
        write(home / "data", resources)
        with SandboxProcess(home / "data", options=("--faults", plan.model_dump_json())) as server:
            settings = {
                "fhir_base_url": server.url,
                "fhir_source": SourceKind.SEARCH,
                "fhir_partition": Granularity.DAILY,
                "fhir_resource_types": ",".join(TYPES),
                "fhir_last_updated_gte": END - timedelta(days=DAYS),
                "fhir_page_size": page_size,
            }
            return _measure(home, server, settings)


def _measure(home: Path, server: SandboxProcess, settings: Mapping[str, object]) -> int:
    connections = load_settings(fhir_assets_home=home, db_url=None, **settings).fhir_max_connections
    requests, answered, first, last = 0, 0, END - timedelta(days=DAYS), END - timedelta(days=1)
    fetching: list[tuple[float, float]] = []
    with deployed(home, **settings) as (ingestion, instance):
        meter = Meter(home, excluded=server.pid)
        with meter.record_peaks(), meter.measure_part("load"):
            for windows in ingestion.due_loads.find(first=first, last=last):
                server.reset_stats()
                outcome = ingestion.load(windows, refresh=Refresh.MISSING, triggered_by="benchmark")
                if select_failed([outcome]):
                    raise SystemExit("a run failed: there is nothing to measure")
                stats = server.stats()
                requests += sum(stats["requests"].values())
                answered = max(answered, stats["max_in_flight"])
                fetching += [
                    (step.start_time, step.end_time)
                    for step in instance.get_run_step_stats(outcome.run_id)
                    if step.step_key.startswith("raw__") and step.start_time and step.end_time
                ]
    cost, loaded = meter.parts["load"], sum(stats["resources"].values())
    ours = Spent(cost.seconds, cost.load, cost.postgres, meter.peak_own / 2**20)
    seconds = _union(fetching)
    possible = requests * _ANSWER_SECONDS / connections
    print(
        f"{loaded:,} resources by {requests:,} requests, at most {answered} at the same time of {connections}\n"
        f"  fetch {seconds:.1f} s, the connections allow {possible:.1f} s; the whole load {ours}"
    )
    title = f"{loaded:,} resources by search, answers after {_ANSWER_SECONDS * 1000:.0f} ms"
    unit = f" of {connections} connections"
    return report(
        Figure(7, f"{title}, the fetch", possible / seconds, GOAL_SHARE, unit, True),
        Figure(7, f"{title}, the whole load", possible / ours.seconds, None, unit, ours=ours),
    )


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """Return the seconds during which at least one of the spans lasts."""
    seconds, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        seconds += max(0.0, last - max(first, end))
        end = max(end, last)
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("resources", type=int, nargs="?", default=RESOURCES)
    parser.add_argument("--page-size", type=int, default=_PAGE_SIZE)
    arguments = parser.parse_args()
    sys.exit(main(arguments.resources, arguments.page_size))
