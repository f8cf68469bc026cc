"""`kill -9` at any moment: the same window again ends in the tables of one clean run."""

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
    """`fhir-assets …` as a process of its own on the deployment; its Dagster storage is in the test's database."""
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
    """Start a command and kill it so long after its first step began; whether it was still at work."""
    line, environment = command(deployment, arguments)
    before = begun_runs(deployment)
    process = subprocess.Popen(
        line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and begun_runs(deployment) == before:
        time.sleep(0.02)
    time.sleep(seconds)
    at_work = process.poll() is None
    if at_work:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return at_work


def begun_runs(deployment: Deployment) -> int:
    """How many runs have begun; the first one makes the tables."""
    try:
        return int(deployment.query("SELECT count(DISTINCT run_id) FROM ops.ingestion_runs")[0][0])
    except (UndefinedTable, InvalidSchemaName):
        return 0


def finish(deployment: Deployment, arguments: Sequence[str] = LOAD) -> None:
    """Run a command to the end."""
    line, environment = command(deployment, arguments)
    subprocess.run(line, env=environment, check=True, capture_output=True, timeout=300)


def story(deploy: Deploy, folder: Path, other_database: str, kills: int, patients: int, **settings: str) -> None:
    write_population(folder, Population(patients, 3, 0.02, end=END, start=START))
    with SandboxServer(folder) as server:
        clean = deploy(home="clean", fhir_base_url=server.url, **settings)
        finish(clean)
        work = clean.query("SELECT extract(epoch FROM max(finished_at) - min(started_at)) FROM ops.ingestion_runs")
        whole = float(work[0][0])
        killed = deploy(home="killed", url=other_database, fhir_base_url=server.url, **settings)
        at_work = [run_and_kill(killed, random.Random(n).uniform(0, 0.9) * whole) for n in range(kills)]
        assert any(at_work)
        finish(killed)
    assert killed.tables() == clean.tables()
    assert killed.dead() == clean.dead()
    left = killed.query("SELECT count(*) FROM ops.ingestion_runs WHERE status = 'RUNNING'")
    assert left == [(0,)]


def test_a_load_killed_three_times_gives_the_tables_of_an_uninterrupted_load(
    deploy: Deploy, tmp_path: Path, empty_database: str
) -> None:
    story(deploy, tmp_path / "population", empty_database, kills=3, patients=10, fhir_resource_types=RESOURCE_TYPES)


@pytest.mark.slow
def test_a_load_killed_twenty_times_gives_the_tables_of_an_uninterrupted_load(
    deploy: Deploy, tmp_path: Path, empty_database: str
) -> None:
    story(deploy, tmp_path / "population", empty_database, kills=20, patients=20)


@pytest.mark.slow
def test_a_replay_killed_ten_times_gives_the_tables_of_a_load_without_dead_letters(
    deploy: Deploy, empty_database: str
) -> None:
    bodies = [
        patient(f"p{n}", START + timedelta(seconds=8 * n), gender="wrong" if n % 2 else "male") for n in range(20_000)
    ]
    mended = ("required-binding:Patient.gender",)
    with SandboxServer(bodies) as server:
        at = {"fhir_base_url": server.url, "fhir_resource_types": "Patient"}
        clean = deploy(home="clean", validation_warn_rules=mended, **at)
        finish(clean)
        strict = deploy(home="killed", url=empty_database, **at)
        finish(strict)
        assert strict.dead() == {"required-binding": 10_000}
        killed = replace(strict, settings=strict.settings.model_copy(update={"validation_warn_rules": mended}))
        at_work = [run_and_kill(killed, n * 0.25, REPLAY) for n in range(10)]
        assert any(at_work)
        finish(killed, REPLAY)
        assert killed.query("SELECT count(*) FROM ops.dead_letters WHERE status <> 'resolved'") == [(0,)]
        finish(killed)
    assert killed.dead() == {}
    assert killed.tables() == clean.tables()
    assert killed.query("SELECT count(*) FROM ops.ingestion_runs WHERE status = 'RUNNING'") == [(0,)]
