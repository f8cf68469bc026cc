"""Measure what a window costs beyond its resources: ``python -m benchmarks.window_cost [windows] [--resource]``.

It loads daily windows of all types by search, which are empty, or have one resource each. The cost of a window is what
it adds to the run that loads it: the time of the runs without that of as many runs of a single window. It includes the
one resource. CPU is the time of the loading process and of its Postgres, without the sandbox server.
"""

import argparse
import sys
from datetime import timedelta

from benchmarks.deployment import deployed
from benchmarks.figures import Figure, report
from benchmarks.loader import START
from benchmarks.machine import scratch
from benchmarks.meter import Cost, Meter
from benchmarks.processes import Spent
from benchmarks.windows import WINDOWS, format_cost, measure_run, search_settings, write_nearly_empty
from fhir_assets.sandbox.process import SandboxProcess

GOAL_MILLISECONDS = 10.0
"""The most that a window of all types costs."""
GOAL_MIB = 260.0
"""The most memory of a load of ``WINDOWS`` windows."""

_DAY = timedelta(days=1)
_FIRST_DAYS = 4


def main(count: int = WINDOWS, *, resource: bool = False) -> int:
    """Print the figures. Return 1 if a goal is missed."""
    content = "with one resource each" if resource else "that are empty"
    days = count + _FIRST_DAYS
    with scratch() as home:
        # Empty windows follow a first day with the only resource.
        data = write_nearly_empty(home / "data", days, 1 if resource else days)
        with SandboxProcess(data) as server, deployed(home, **search_settings(server)) as (ingestion, _):
            meter = Meter(home, excluded=server.pid)
            find = ingestion.due_loads.find
            # The first run creates the tables. The others say what a run of one window costs.
            first = [START + number * _DAY for number in range(_FIRST_DAYS)]
            _, *single = (measure_run(ingestion, meter, part) for day in first for part in find(first=day, last=day))
            due = find(first=first[-1] + _DAY, last=first[-1] + count * _DAY)
            with meter.record_peaks():
                total = sum((measure_run(ingestion, meter, part) for part in due), Cost())
            windows = sum(len(part.windows) for part in due)
    run = min(single, key=lambda cost: cost.seconds)
    print(format_cost(f"{windows:,} windows {content}", total))
    print(format_cost("a run of one of them", run))
    runs, others = len(due), windows - len(due)
    milliseconds = (total.seconds - runs * run.seconds) / others * 1000
    processor = (total.load + total.postgres - runs * (run.load + run.postgres)) / others * 1000
    ours = Spent(total.seconds, total.load, total.postgres, meter.peak_own / 2**20)
    title = f"{windows:,} windows of all types {content}"
    return report(
        Figure(2, f"a window, of {title}", milliseconds, GOAL_MILLISECONDS, " ms", ours=ours),
        Figure(2, f"a window, of {title}, CPU", processor, None, " ms"),
        Figure(8, f"memory, {title}", ours.peak_mib, GOAL_MIB, " MiB"),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("windows", type=int, nargs="?", default=WINDOWS, help="at least 2")
    parser.add_argument("--resource", action="store_true", help="Windows with one resource each")
    arguments = parser.parse_args()
    sys.exit(main(arguments.windows, resource=arguments.resource))
