"""Runs on Celery workers: Redis, two `fhir-assets worker` processes, and one of them killed in the middle."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import dagster as dg
import pytest

from fhir_assets.automation.requests import RANGE_END, RANGE_START, UNFINISHED
from fhir_assets.deployment import instance_yaml
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.e2e.conftest import Deploy, Deployment
from fhir_assets_tests.e2e.test_backfill import END, NEVER, START, daemon, environment, until

pytestmark = pytest.mark.slow

TYPES = "Patient,Encounter,Observation"
STRETCHES = [(n, n + 9) for n in range(0, 90, 10)]
ALLOWED = 4
RANGE = (RANGE_START, RANGE_END)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """The URL of a Redis of the test's own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        yield f"redis://127.0.0.1:{port}/0"
        process.terminate()


@contextmanager
def worker(deployment: Deployment, log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """`fhir-assets worker` as a process of its own."""
    code = "from fhir_assets.cli import main; main()"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "worker"], env=env, cwd=deployment.settings.home, stdout=output, stderr=output
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def test_90_windows_on_two_workers_one_of_them_killed_are_the_tables_of_one_clean_run(
    deploy: Deploy, tmp_path: Path, empty_database: str, redis: str
) -> None:
    write_population(tmp_path / "population", Population(10, 11, 0.02, start=START, end=END))
    with SandboxServer(tmp_path / "population") as server:
        settings = {"fhir_base_url": server.url, "fhir_resource_types": TYPES, "fhir_last_updated_gte": "2024-01-01"}
        clean = deploy(home="clean", url=empty_database, **settings)
        assert all(outcome.success for outcome in clean.ingest(first=START, last=END.replace(day=30)))
        spread = deploy(fhir_executor="celery", celery_broker_url=redis, **settings)
        home = spread.settings.home / "dagster" / "dagster.yaml"
        home.write_text(instance_yaml(spread.settings).replace("poll_interval_seconds: 30", "poll_interval_seconds: 5"))
        changed = {
            "FHIR_EXECUTOR": "celery",
            "CELERY_BROKER_URL": redis,
            "FHIR_SCHEDULE": NEVER,
            "FHIR_MAX_CONNECTIONS": str(ALLOWED),
        }
        env = environment(spread, **changed)
        with (
            daemon(spread, tmp_path / "daemon.log", **changed),
            worker(spread, tmp_path / "one.log", env) as one,
            worker(spread, tmp_path / "two.log", env),
        ):
            for first, last in STRETCHES:
                days = [f"{START + timedelta(days=n):%Y-%m-%d}" for n in (first, last)]
                command = [sys.executable, "-m", "dagster", "job", "launch", "-m", "fhir_assets.definitions"]
                command += ["--job", "incremental_load", "--tags", json.dumps(dict(zip(RANGE, days, strict=True)))]
                subprocess.run(command, env=env, cwd=spread.settings.home, check=True, capture_output=True)
            done = "SELECT count(DISTINCT partition_key) FROM ops.ingestion_runs WHERE status = 'SUCCESS'"
            begun = "SELECT count(*) FROM ops.ingestion_runs WHERE status = 'RUNNING'"
            until(lambda: spread.query(done)[0][0] >= 30 and spread.query(begun)[0][0] > 0, seconds=300)
            one.send_signal(signal.SIGKILL)
            unfinished = dg.RunsFilter(statuses=UNFINISHED)

            def complete() -> bool:
                return spread.query(done)[0][0] >= 90 and spread.instance.get_runs_count(unfinished) == 0

            until(complete, seconds=900)
        assert 0 < server.stats()["max_in_flight"] <= ALLOWED
    assert spread.tables() == clean.tables()
    assert spread.dead() == clean.dead()
