"""A load that is killed at any moment and then repeated gives the tables of an uninterrupted load."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from psycopg.errors import InvalidSchemaName, UndefinedTable

from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.postgres.db.connections import normalise_url
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.small_population import END, RESOURCE_TYPES, START

LOAD = ("ingest", "--from", "2024-01-01", "--to", "2024-01-02")
REPLAY = ("dead-letters", "replay", "--all")


def command(deployment: Deployment, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command line and environment of ``fhir-assets`` for the deployment."""
    settings = deployment.settings
    environment = {
        **os.environ,
        "FHIR_BASE_URL": settings.fhir_base_url,
        "FHIR_LAST_UPDATED_GTE": "2024-01-01",
        "FHIR_ASSETS_HOME": str(settings.home),
        "FHIR_PAGE_SIZE": "50",
        "FHIR_RESOURCE_TYPES": ",".join(settings.fhir_resource_types),
        "DB_URL": deployment.url,
        "DAGSTER_POSTGRES_URL": normalise_url(deployment.url, "psycopg2"),
        "VALIDATION_WARN_RULES": ",".join(settings.validation_warn_rules),
    }
    environment.pop("DAGSTER_HOME", None)
    code = "from fhir_assets.cli import main; main()"
    return [sys.executable, "-c", code, *arguments], environment


def run_and_kill(deployment: Deployment, seconds: float, arguments: Sequence[str] = LOAD) -> bool:
    """Start a command and kill it ``seconds`` after its first step began. Return whether it was still running."""
    line, environment = command(deployment, arguments)
    before = count_runs(deployment)
    process = subprocess.Popen(
        line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and count_runs(deployment) == before:
        time.sleep(0.02)
    time.sleep(seconds)
    was_running = process.poll() is None
    if was_running:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return was_running


def count_runs(deployment: Deployment) -> int:
    """Return the number of runs that have begun, 0 before the first run creates the tables."""
    try:
        return int(deployment.query("SELECT count(DISTINCT run_id) FROM ops.ingestion_runs")[0][0])
    except (UndefinedTable, InvalidSchemaName):
        return 0


def finish(deployment: Deployment, arguments: Sequence[str] = LOAD) -> None:
    """Run a command to the end."""
    line, environment = command(deployment, arguments)
    subprocess.run(line, env=environment, check=True, capture_output=True, timeout=300)


def assert_killed_load_equals_clean_load(
    deploy: Deploy, folder: Path, other_database: str, kills: int, patients: int, **settings: str
) -> None:
    write_population(folder, Population(patients, 3, 0.02, end=END, start=START))
    with SandboxServer(folder) as server:
        clean = deploy(home="clean", fhir_base_url=server.url, **settings)
        finish(clean)
        work = clean.query("SELECT extract(epoch FROM max(finished_at) - min(started_at)) FROM ops.ingestion_runs")
        duration = float(work[0][0])
        killed = deploy(home="killed", url=other_database, fhir_base_url=server.url, **settings)
        was_running = [run_and_kill(killed, random.Random(n).uniform(0, 0.9) * duration) for n in range(kills)]
        assert any(was_running)
        finish(killed)
    assert killed.tables() == clean.tables()
    assert killed.count_dead_letters() == clean.count_dead_letters()
    left = killed.query("SELECT count(*) FROM ops.ingestion_runs WHERE status = 'RUNNING'")
    assert left == [(0,)]


@pytest.mark.slow
def test_a_load_killed_three_times_gives_the_tables_of_an_uninterrupted_load(
    deploy: Deploy, tmp_path: Path, empty_database: str
) -> None:
    assert_killed_load_equals_clean_load(
        deploy, tmp_path / "population", empty_database, kills=3, patients=10, fhir_resource_types=RESOURCE_TYPES
    )


@pytest.mark.slow
def test_a_load_of_all_types_killed_ten_times_gives_the_tables_of_an_uninterrupted_load(
    deploy: Deploy, tmp_path: Path, empty_database: str
) -> None:
    assert_killed_load_equals_clean_load(deploy, tmp_path / "population", empty_database, kills=10, patients=20)


@pytest.mark.slow
def test_a_replay_killed_five_times_gives_the_tables_of_a_load_without_dead_letters(
    deploy: Deploy, empty_database: str
) -> None:
    bodies = [
        patient(f"p{n}", START + timedelta(seconds=8 * n), gender="wrong" if n % 2 else "male") for n in range(20_000)
    ]
    lenient_rules = ("required-binding:Patient.gender",)
    with SandboxServer(bodies) as server:
        at = {"fhir_base_url": server.url, "fhir_resource_types": "Patient"}
        clean = deploy(home="clean", validation_warn_rules=lenient_rules, **at)
        finish(clean)
        strict = deploy(home="killed", url=empty_database, **at)
        finish(strict)
        assert strict.count_dead_letters() == {"required-binding": 10_000}
        killed = replace(strict, settings=strict.settings.model_copy(update={"validation_warn_rules": lenient_rules}))
        was_running = [run_and_kill(killed, n * 0.5, REPLAY) for n in range(5)]
        assert any(was_running)
        finish(killed, REPLAY)
        assert killed.query("SELECT count(*) FROM ops.dead_letters WHERE status <> 'resolved'") == [(0,)]
        finish(killed)
    assert killed.count_dead_letters() == {}
    assert killed.tables() == clean.tables()
    assert killed.query("SELECT count(*) FROM ops.ingestion_runs WHERE status = 'RUNNING'") == [(0,)]
