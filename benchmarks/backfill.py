"""Measure a backfill as launched in Dagster's UI: the daemon requests the runs.

``python -m benchmarks.backfill [windows]`` backfills nearly empty daily windows of all types by search: every tenth day
has one resource. The runs load FHIR_WINDOWS_PER_RUN windows each; FHIR_MAX_RUNS runs are executed at the same time.
CPU is that of the daemon, its runs, Postgres and the sandbox server. ``--storage stock`` measures with the storage of
dagster-postgres.

``python -m benchmarks.backfill --page`` backfills 31 days of a population like that of `fhir-assets demo`, in one run,
and measures how long the pages of the backfill and of the run take in a headless Chromium.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import perf_counter

import dagster as dg

from benchmarks.deployment import Storage, deployed
from benchmarks.loader import START
from benchmarks.machine import cpu_seconds, scratch
from benchmarks.pages import measure_pages
from benchmarks.windows import DAYS_PER_RESOURCE, LIMIT_SECONDS, WINDOWS, write_nearly_empty
from fhir_assets.cli import demo
from fhir_assets.definitions import build_definitions
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxProcess
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.daemon import backfill, dagster_daemon

_TIMEOUT_SECONDS = 1800.0
_PAGE_DAYS = 31


def main(count: int = WINDOWS, storage: Storage = Storage.OWN) -> int:
    """Print the duration. Return 1 if it exceeds the limit, scaled to the number of windows."""
    load = os.getloadavg()[0]
    with scratch() as home, SandboxProcess(write_nearly_empty(home / "data", count)) as server:
        _set_environment(home, server.url, START)
        with deployed(home, storage) as (_, instance):
            days = [f"{START + timedelta(days=day):%Y-%m-%d}" for day in range(count)]
            seconds, processor, runs = _run_backfill(instance, home, days)
        with connect(embedded.ensure(home)) as conn:
            (loaded,) = conn.execute("SELECT count(*) FROM fhir.resource").fetchone() or (0,)
    _require_success(runs)
    if loaded != len(range(0, count, DAYS_PER_RESOURCE)):
        raise SystemExit("the backfill loaded too little: there is nothing to measure")
    limit = LIMIT_SECONDS * count / WINDOWS
    print(
        f"{count:,} windows in {len(runs)} runs, at load {load:.1f}, storage {storage.value}: {seconds:.0f} s "
        f"(limit {limit:.0f} s), CPU {processor:.1f} s"
    )
    return int(seconds > limit)


def measure_page(storage: Storage = Storage.OWN) -> int:
    """Print the seconds until the pages show their content. Return 1 if they exceed the limit."""
    end = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    start = end - timedelta(days=_PAGE_DAYS + 1)
    with scratch() as home:
        (home / "data").mkdir()
        population = Population(demo.PATIENTS, demo.SEED, demo.BAD_SHARE, end=end, start=start)
        write_population(home / "data", population)
        with SandboxProcess(home / "data") as server:
            _set_environment(home, server.url, start)
            with deployed(home, storage) as (_, instance):
                days = [f"{start + timedelta(days=day):%Y-%m-%d}" for day in range(_PAGE_DAYS + 1)]
                *_, runs = _run_backfill(instance, home, days)
                _require_success(runs)
                [run] = runs
                steps = len(instance.get_run_step_stats(run.run_id))
                events = len(instance.get_records_for_run(run.run_id).records)
            print(f"a run of {_PAGE_DAYS} windows with {events:,} events")
            backfill_id = run.tags["dagster/backfill"]
            pages = {
                "page of the backfill": (f"/runs/b/{backfill_id}", r"100% completed"),
                "page of the run, all events": (f"/runs/{run.run_id}", rf"Succeeded\s*\({steps}\)"),
            }
            return 0 if measure_pages(home, pages) else 1


def _set_environment(home: Path, url: str, start: datetime) -> None:
    """Set the settings of this process, the daemon, its runs and the UI."""
    settings: Mapping[str, str] = {
        "FHIR_BASE_URL": url,
        "FHIR_SOURCE": "search",
        "FHIR_PARTITION": "daily",
        "FHIR_LAST_UPDATED_GTE": f"{start:%Y-%m-%d}",
        "FHIR_SCHEDULE": "0 0 1 1 *",
        "FHIR_ASSETS_HOME": str(home),
    }
    os.environ.update(settings)


def _require_success(runs: list[dg.DagsterRun]) -> None:
    if {run.status for run in runs} != {dg.DagsterRunStatus.SUCCESS}:
        raise SystemExit("the backfill failed: there is nothing to measure")


def _run_backfill(
    instance: dg.DagsterInstance, home: Path, days: list[str]
) -> tuple[float, float, list[dg.DagsterRun]]:
    """Return the seconds and CPU seconds from the request to the end of the last run, and the runs.

    The daemon is started before, and backfills the first day.
    """
    with dagster_daemon(os.environ, home, home / "daemon.log"):
        definitions = build_definitions(load_settings())
        backfill(instance, definitions, days[:1], seconds=_TIMEOUT_SECONDS)
        started, before = perf_counter(), cpu_seconds(home)
        runs = backfill(instance, definitions, days[1:], seconds=_TIMEOUT_SECONDS)
        return perf_counter() - started, cpu_seconds(home) - before, runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("windows", type=int, nargs="?", default=WINDOWS)
    parser.add_argument("--page", action="store_true", help="Measure the pages of a backfill of 31 days")
    parser.add_argument("--storage", type=Storage, choices=list(Storage), default=Storage.OWN)
    arguments = parser.parse_args()
    sys.exit(measure_page(arguments.storage) if arguments.page else main(arguments.windows, arguments.storage))
