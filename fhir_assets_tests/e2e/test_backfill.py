"""Dagster's own daemon at work on a deployment: a backfill of three months, and the schedule."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.scheduler.instigation import InstigatorTick, TickStatus

from fhir_assets.automation.requests import UNFINISHED
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.database import normalise_url
from fhir_assets_tests.e2e.conftest import Deploy, Deployment
from fhir_assets_tests.e2e.content import patient

pytestmark = pytest.mark.slow

START = datetime(2024, 1, 1, tzinfo=UTC)
END = datetime(2024, 3, 31, tzinfo=UTC)
NEVER = "0 0 1 1 *"


def environment(deployment: Deployment, **changed: str) -> dict[str, str]:
    """What the daemon, its code server and its runs find."""
    settings = deployment.settings
    return {
        **os.environ,
        "DAGSTER_HOME": str(settings.home / "dagster"),
        "DAGSTER_POSTGRES_URL": normalise_url(deployment.url, "psycopg2"),
        "DB_URL": deployment.url,
        "FHIR_ASSETS_HOME": str(settings.home),
        "FHIR_BASE_URL": settings.fhir_base_url,
        "FHIR_SOURCE": settings.fhir_source.value,
        "FHIR_RESOURCE_TYPES": ",".join(settings.fhir_resource_types),
        "FHIR_LAST_UPDATED_GTE": "2024-01-01",
        "FHIR_PARTITION": settings.fhir_partition.value,
        "FHIR_OVERLAP_SECONDS": "0",
        **changed,
    }


@contextmanager
def daemon(deployment: Deployment, log: Path, **changed: str) -> Iterator[None]:
    """Runs ``dagster-daemon`` with a code server of its own; nothing of it is left afterwards."""
    command = [sys.executable, "-m", "dagster._daemon", "run", "--module-name", "fhir_assets.definitions"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment(deployment, **changed),
            cwd=deployment.settings.home,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield
            assert process.poll() is None
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def until(holds: Callable[[], bool], *, seconds: float) -> None:
    """Wait for something that the daemon does by itself."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "the daemon did not get there"
        time.sleep(1)


def test_a_backfill_of_90_days_ends_green_and_reconciles(deploy: Deploy, tmp_path: Path, empty_database: str) -> None:
    write_population(tmp_path / "population", Population(10, 11, 0.02, start=START, end=END))
    types = "Patient,Encounter,Observation"
    with SandboxServer(tmp_path / "population") as server:
        deployment = deploy(fhir_base_url=server.url, fhir_resource_types=types, fhir_last_updated_gte="2024-01-01")
        with daemon(deployment, tmp_path / "daemon.log", FHIR_SCHEDULE=NEVER):
            command = [sys.executable, "-m", "dagster", "job", "backfill", "--module-name", "fhir_assets.definitions"]
            command += ["--job", "incremental_load", "--from", "2024-01-01", "--to", "2024-03-30", "--noprompt"]
            found = environment(deployment, FHIR_SCHEDULE=NEVER)
            subprocess.run(command, env=found, cwd=deployment.settings.home, check=True, capture_output=True)
            (backfill,) = deployment.instance.get_backfills()
            of_backfill = {"dagster/backfill": backfill.backfill_id}
            unfinished = dg.RunsFilter(tags=of_backfill, statuses=UNFINISHED)
            until(lambda: deployment.instance.get_runs_count(unfinished) == 0, seconds=1500)
        runs = deployment.instance.get_runs(dg.RunsFilter(tags=of_backfill))
        clean = deploy(
            home="clean",
            url=empty_database,
            fhir_base_url=server.url,
            fhir_resource_types=types,
            fhir_last_updated_gte="2024-01-01",
        )
        assert all(outcome.success for outcome in clean.ingest(first=START, last=END))
    assert {run.status for run in runs} == {dg.DagsterRunStatus.SUCCESS}
    partitions = deployment.query(
        "SELECT count(DISTINCT partition_key), min(status), max(status) FROM ops.ingestion_runs"
    )
    assert partitions == [(90, "SUCCESS", "SUCCESS")]
    evaluations = [each for run in runs for each in deployment.checks(run.run_id)]
    assert len(evaluations) >= 3
    assert all(each.passed for each in evaluations)
    assert deployment.tables() == clean.tables()
    assert deployment.dead() == clean.dead()


def test_the_schedule_loads_what_is_new_and_asks_for_nothing_twice(deploy: Deploy, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "Patient.ndjson").write_bytes(patient("a", START) + b"\n")
    deployment = deploy(
        fhir_source="ndjson",
        fhir_base_url=str(folder),
        fhir_resource_types="Patient",
        fhir_partition="monthly",
        fhir_last_updated_gte="2024-01-01",
    )

    def ticks() -> list[InstigatorTick]:
        states = deployment.instance.all_instigator_state()
        return [
            tick
            for state in states
            if state.instigator_name == "incremental_load"
            for tick in reversed(deployment.instance.get_ticks(state.instigator_origin_id, state.selector_id))
            if tick.status is not TickStatus.STARTED
        ]

    with daemon(deployment, tmp_path / "daemon.log", FHIR_SCHEDULE="* * * * *"):
        until(lambda: len(ticks()) >= 2, seconds=240)
        until(lambda: deployment.loaded() == {"Patient": 1}, seconds=60)
        (folder / "more.Patient.ndjson").write_bytes(patient("b", START.replace(day=2)) + b"\n")
        asked = len(ticks())
        until(lambda: deployment.loaded() == {"Patient": 2}, seconds=180)
        until(lambda: len(ticks()) >= asked + 2, seconds=180)
    assert {tick.status for tick in ticks()} == {TickStatus.SUCCESS, TickStatus.SKIPPED}
    assert [tick.status for tick in ticks()].count(TickStatus.SUCCESS) == 2
    runs = deployment.instance.get_runs()
    assert [run.status for run in runs] == [dg.DagsterRunStatus.SUCCESS] * 2
    triggers = deployment.query("SELECT DISTINCT triggered_by FROM ops.ingestion_runs")
    assert triggers == [("schedule_name:incremental_load",)]
