"""Responses of the API while the database or the store is unavailable, and after it is available again."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import requests

from fhir_assets.api import context
from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.settings import load_settings
from fhir_assets_tests.support.api import TOKENS, Api, api_in_threads, api_process, api_settings
from fhir_assets_tests.support.daemon import wait_until
from fhir_assets_tests.support.databases import database_unavailable

RECORD = {"records": [{"resourceType": "Patient", "mrn": "SECRET-MRN", "name": "Ada SECRET"}]}


@pytest.fixture
def api(database: str, tmp_path: Path) -> Iterator[Api]:
    settings = load_settings(
        db_url=database,
        fhir_assets_home=tmp_path / "home",
        fhir_resource_types="Patient",
        api_tokens=TOKENS,
        dagster_webserver_url=f"http://127.0.0.1:{find_free_port()}",
    )
    with api_in_threads(settings) as running:
        yield running


def test_without_the_database_responses_are_problems_without_data_and_the_api_recovers(
    api: Api, postgres: str, database: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert api.get("/patients?mrn=SECRET-MRN").status_code == 200
    assert api.post("/api/v1/ingest", json=RECORD).status_code == 202
    with database_unavailable(postgres, database), monkeypatch.context() as impatient:
        impatient.setattr(context, "CONNECTION_TIMEOUT_SECONDS", 0.5)
        answers = [
            api.get("/patients?mrn=SECRET-MRN"),
            api.get("/patients/SECRET-MRN"),
            api.get("/runs"),
            api.post("/api/v1/ingest", json=RECORD),
        ]
        for answer in answers:
            assert (answer.status_code, answer.headers["Content-Type"]) == (503, "application/problem+json")
            assert int(answer.headers["Retry-After"]) > 0
            assert set(answer.json()) == {"type", "title", "status", "detail", "request_id"}
            assert not any(word in answer.text for word in ("SECRET", "Traceback", "psycopg", ".py", "SELECT"))
        health = api.get("/health", role=None)
        assert (health.status_code, health.json()["database"], health.json()["store"]) == (503, False, True)
        assert api.get("/health/live", role=None).status_code == 200
        assert b"fhir_database_up 0" in api.get("/metrics").content
    assert api.get("/patients?mrn=SECRET-MRN").status_code == 200
    assert api.post("/api/v1/ingest", json=RECORD).status_code == 202
    assert api.get("/health", role=None).json()["database"] is True
    assert "SECRET" not in caplog.text


def test_without_the_store_no_record_is_accepted(api: Api, tmp_path: Path) -> None:
    assert api.get("/health", role=None).json() == {
        "live": True,
        "ready": False,
        "database": True,
        "store": True,
        "landing": True,
        "dagster": False,
    }
    store = tmp_path / "home" / "store"
    store.rename(tmp_path / "elsewhere")
    store.write_text("no folder")
    answer = api.post("/api/v1/ingest", json=RECORD)
    assert (answer.status_code, answer.headers["Content-Type"]) == (503, "application/problem+json")
    assert "SECRET" not in answer.text
    assert api.get("/health/ready", role=None).json()["store"] is False
    store.unlink()
    assert api.get("/health/ready", role=None).json()["store"] is True
    assert api.post("/api/v1/ingest", json=RECORD).status_code == 202


def test_a_missing_landing_zone_is_not_ready(database: str, tmp_path: Path) -> None:
    zone = tmp_path / "landing"
    zone.mkdir()
    settings = load_settings(
        fhir_assets_home=tmp_path / "home", db_url=database, api_tokens=TOKENS, fhir_landing_url=str(zone)
    )
    with api_in_threads(settings) as api:
        assert api.get("/health/ready", role=None).json()["landing"] is True
        zone.rmdir()
        answer = api.get("/health/ready", role=None)
        assert (answer.status_code, answer.json()["landing"]) == (503, False)


@pytest.mark.slow
def test_the_processes_of_the_api_outlive_an_outage_and_a_kill(database: str, postgres: str, tmp_path: Path) -> None:
    values = api_settings(database, tmp_path, {"fhir_resource_types": "Patient"})
    with api_process(values, tmp_path, workers=2) as api:
        assert api.process is not None
        supervisor = psutil.Process(api.process.pid)
        with database_unavailable(postgres, database):
            assert api.get("/patients").status_code == 503
        assert api.post("/api/v1/ingest", json=RECORD).status_code == 202
        killed = find_workers(supervisor)
        assert len(killed) == 2
        for worker in killed:
            worker.kill()
        wait_until(lambda: len(set(find_workers(supervisor)) - set(killed)) == 2, seconds=120)
        wait_until(lambda: answers(api), seconds=120)
        assert api.post("/api/v1/ingest", json=RECORD).status_code == 202
        api.process.terminate()
        assert api.process.wait(60) == 0


@pytest.mark.slow
def test_the_workers_of_a_killed_api_end_and_it_can_be_started_again(database: str, tmp_path: Path) -> None:
    values = api_settings(database, tmp_path, {"fhir_resource_types": "Patient"})
    with api_process(values, tmp_path, workers=2) as api:
        assert api.process is not None
        workers = find_workers(psutil.Process(api.process.pid))
        assert len(workers) == 2
        api.process.kill()
        assert psutil.wait_procs(workers, timeout=60)[1] == []
        with api_process(values, tmp_path, workers=2, port=int(api.url.rpartition(":")[2])) as again:
            assert again.post("/api/v1/ingest", json=RECORD).status_code == 202


def find_workers(supervisor: psutil.Process) -> list[psutil.Process]:
    """Return the living processes that answer requests."""
    living = [child for child in supervisor.children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in living if "spawn_main" in str(child.cmdline())]


def answers(api: Api) -> bool:
    with suppress(requests.ConnectionError):
        return api.get("/health/live", role=None).ok
    return False


def test_metrics_are_for_operators(api: Api) -> None:
    answer = api.get("/metrics", role="operator")
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert b"fhir_database_up 1" in answer.content
    assert api.get("/metrics", role="reader").status_code == 403
