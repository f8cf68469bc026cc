"""Measure a backfill of nearly empty windows as launched in Dagster's UI: the daemon requests the runs.

``python -m benchmarks.backfill [windows]`` backfills daily windows of all types by search. Every tenth day has one
resource. The runs load FHIR_WINDOWS_PER_RUN windows each; FHIR_MAX_RUNS runs are executed at the same time.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path
from time import perf_counter

import dagster as dg

from benchmarks.deployment import deployed
from benchmarks.loader import START
from benchmarks.machine import scratch
from benchmarks.windows import DAYS_PER_RESOURCE, LIMIT_SECONDS, WINDOWS, write_nearly_empty
from fhir_assets.definitions import build_definitions
from fhir_assets.sandbox.process import SandboxProcess
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.daemon import backfill, dagster_daemon

_TIMEOUT_SECONDS = 1800.0


def main(count: int = WINDOWS) -> int:
    """Print the duration. Return 1 if it exceeds the limit, scaled to the number of windows."""
    load = os.getloadavg()[0]
    with scratch() as home, SandboxProcess(write_nearly_empty(home / "data", count)) as server:
        settings = {
            "FHIR_BASE_URL": server.url,
            "FHIR_SOURCE": "search",
            "FHIR_PARTITION": "daily",
            "FHIR_LAST_UPDATED_GTE": f"{START:%Y-%m-%d}",
            "FHIR_SCHEDULE": "0 0 1 1 *",
            "FHIR_ASSETS_HOME": str(home),
        }
        os.environ.update(settings)
        with deployed(home) as (_, instance):
            seconds, runs = _run_backfill(
                instance, home, [f"{START + timedelta(days=day):%Y-%m-%d}" for day in range(count)]
            )
        with connect(embedded.ensure(home)) as conn:
            (loaded,) = conn.execute("SELECT count(*) FROM fhir.resource").fetchone() or (0,)
    if {run.status for run in runs} != {dg.DagsterRunStatus.SUCCESS} or loaded != len(
        range(0, count, DAYS_PER_RESOURCE)
    ):
        raise SystemExit("the backfill failed: there is nothing to measure")
    limit = LIMIT_SECONDS * count / WINDOWS
    print(f"{count:,} windows in {len(runs)} runs, at load {load:.1f}: {seconds:.0f} s (limit {limit:.0f} s)")
    return int(seconds > limit)


def _run_backfill(instance: dg.DagsterInstance, home: Path, days: list[str]) -> tuple[float, list[dg.DagsterRun]]:
    """Return the seconds from the request to the end of the last run, and the runs. The daemon is started before."""
    with dagster_daemon(os.environ, home, home / "daemon.log"):
        definitions = build_definitions(load_settings())
        backfill(instance, definitions, days[:1], seconds=_TIMEOUT_SECONDS)
        started = perf_counter()
        runs = backfill(instance, definitions, days[1:], seconds=_TIMEOUT_SECONDS)
        return perf_counter() - started, runs


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else WINDOWS))
