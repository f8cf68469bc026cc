"""A backfill of nearly empty windows as somebody launches it in the UI: Dagster's daemon asks for the runs.

``python -m benchmarks.backfill [windows]`` backfills daily windows of all types by search, a resource
every tenth day, in ranges of FHIR_WINDOWS_PER_RUN, FHIR_MAX_RUNS of them at once.
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
from benchmarks.windows import EVERY, LIMIT_SECONDS, WINDOWS, nearly_empty
from fhir_assets.definitions import build_definitions
from fhir_assets.sandbox.process import SandboxProcess
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.daemon import backfill, dagster_daemon

_PATIENCE_SECONDS = 1800.0


def main(count: int = WINDOWS) -> int:
    """Print the figure; 1 if it took longer than the limit, in proportion, allows."""
    load = os.getloadavg()[0]
    with scratch() as home, SandboxProcess(nearly_empty(home / "data", count)) as server:
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
            seconds, runs = _backfilled(
                instance, home, [f"{START + timedelta(days=day):%Y-%m-%d}" for day in range(count)]
            )
        with connect(embedded.ensure(home)) as conn:
            (loaded,) = conn.execute("SELECT count(*) FROM fhir.resource").fetchone() or (0,)
    if {run.status for run in runs} != {dg.DagsterRunStatus.SUCCESS} or loaded != len(range(0, count, EVERY)):
        raise SystemExit("the backfill failed: the figure would say nothing")
    limit = LIMIT_SECONDS * count / WINDOWS
    print(f"{count:,} windows in {len(runs)} runs, at load {load:.1f}: {seconds:.0f} s (limit {limit:.0f} s)")
    return int(seconds > limit)


def _backfilled(instance: dg.DagsterInstance, home: Path, days: list[str]) -> tuple[float, list[dg.DagsterRun]]:
    """Seconds from the request to the end of the last run, with a daemon that was up already; and the runs."""
    with dagster_daemon(os.environ, home, home / "daemon.log"):
        definitions = build_definitions(load_settings())
        backfill(instance, definitions, days[:1], seconds=_PATIENCE_SECONDS)
        started = perf_counter()
        runs = backfill(instance, definitions, days[1:], seconds=_PATIENCE_SECONDS)
        return perf_counter() - started, runs


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else WINDOWS))
