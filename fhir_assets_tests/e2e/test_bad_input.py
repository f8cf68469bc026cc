"""``fhir-assets ingest`` with external failures: one clear error, exit code 1 and unchanged tables."""

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from psycopg import sql

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.sandbox.fault_injection import Credentials
from fhir_assets.sandbox.faults import Fault, FaultKind, RequestKind
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.deployment import Deploy, Deployment

pytestmark = pytest.mark.slow

DAY = datetime(2024, 1, 5, tzinfo=UTC)
SECRET = "Wintergarten"
"""A patient's name, which must not be printed."""

FAMILY = [{"family": SECRET}]


class Website(BaseHTTPRequestHandler):
    """A web server that does not speak FHIR."""

    def do_GET(self) -> None:
        body = b"<!DOCTYPE html><html><body>It works!</body></html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def website() -> Iterator[str]:
    """Run the web server during the block and yield its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Website) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/fhir"
        server.shutdown()


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    with SandboxServer([patient(f"p{n}", DAY + timedelta(hours=n), name=FAMILY) for n in range(20)]) as server:
        yield server


@pytest.fixture
def deployment(deploy: Deploy, server: SandboxServer) -> Deployment:
    """A deployment in which the first day is loaded, so that unchanged tables can be asserted."""
    deployment = deploy(fhir_base_url=server.url, fhir_resource_types="Patient", fhir_last_updated_gte="2024-01-01")
    assert all(outcome.success for outcome in deployment.ingest(first=DAY, last=DAY))
    server.store.seed(patient("new", DAY + timedelta(days=1, hours=1), name=FAMILY), 0)
    return deployment


def ingest(
    deployment: Deployment, *arguments: str, prepare: Callable[[], None] | None = None, **changed: str | None
) -> subprocess.CompletedProcess[str]:
    """Run ``fhir-assets ingest`` in a process of its own, with changed environment variables."""
    settings = deployment.settings
    environment: dict[str, str | None] = {
        **os.environ,
        "FHIR_BASE_URL": settings.fhir_base_url,
        "FHIR_RESOURCE_TYPES": "Patient",
        "FHIR_LAST_UPDATED_GTE": "2024-01-01",
        "FHIR_ASSETS_HOME": str(settings.home),
        "FHIR_MAX_ATTEMPTS": "2",
        "DB_URL": deployment.url,
        "DAGSTER_POSTGRES_URL": normalise_url(deployment.url, "psycopg2"),
        **changed,
    }
    environment["DAGSTER_HOME"] = None
    return subprocess.run(
        [sys.executable, "-c", "from fhir_assets.cli import main; main()", "ingest", *arguments],
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=prepare,
    )


NEXT_DAY = ("--from", "2024-01-05", "--to", "2024-01-06")


def refused(process: subprocess.CompletedProcess[str], *expected: str) -> bool:
    """Assert an exit code of errors and a short error with the expected words, without tracebacks and patient data."""
    shown = process.stdout + process.stderr
    print(shown)
    assert process.returncode in (1, 75, 78)
    assert SECRET not in shown
    for inside in ("Traceback", 'File "', "dagster._core", "DagsterExecution", "psycopg."):
        assert inside not in shown
    assert all(word in process.stderr for word in expected), process.stderr
    assert len(process.stderr.splitlines()) <= 3
    return True


def test_an_unreachable_server_is_one_clear_error(deploy: Deploy) -> None:
    url = f"http://127.0.0.1:{find_free_port()}/fhir"
    deployment = deploy(fhir_base_url=url, fhir_resource_types="Patient", fhir_last_updated_gte="2024-01-01")
    assert refused(ingest(deployment, *NEXT_DAY), f"GET {url}")


def test_a_server_that_does_not_speak_fhir_is_one_clear_error(deploy: Deploy) -> None:
    with website() as url:
        deployment = deploy(fhir_base_url=url, fhir_resource_types="Patient", fhir_last_updated_gte="2024-01-01")
        assert refused(ingest(deployment, *NEXT_DAY), "HTML, not FHIR")


def test_wrong_credentials_are_one_clear_error(deploy: Deploy) -> None:
    with SandboxServer([patient("x", DAY)], credentials=Credentials("anna", "right")) as guarded:
        url = guarded.url
        deployment = deploy(fhir_base_url=url, fhir_resource_types="Patient", fhir_last_updated_gte="2024-01-01")
        wrong = ingest(
            deployment,
            *NEXT_DAY,
            FHIR_BASE_URL=url,
            FHIR_AUTH_USERNAME="anna",
            FHIR_AUTH_PASSWORD="mistyped",
        )
        assert refused(wrong, "401", "FHIR_AUTH")
        assert "mistyped" not in wrong.stderr
        assert refused(ingest(deployment, *NEXT_DAY, FHIR_BASE_URL=url), "401", "FHIR_AUTH")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"FHIR_RESOURCE_TYPES": "Patient,Pacient"}, "Pacient"),
        ({"FHIR_STORE_URL": "gs://bucket"}, "FHIR_STORE_URL"),
        ({"FHIR_SCHEDULE": "every now and then"}, "FHIR_SCHEDULE"),
    ],
)
def test_an_error_names_the_invalid_setting(
    deployment: Deployment, changed: dict[str, str | None], expected: str
) -> None:
    assert refused(ingest(deployment, *NEXT_DAY, prepare=None, **changed), expected)


@pytest.mark.slow
def test_an_error_names_the_folder_of_files_that_does_not_exist(deploy: Deploy) -> None:
    deployment = deploy(fhir_resource_types="Patient")
    process = ingest(deployment, *NEXT_DAY, FHIR_SOURCE="ndjson", FHIR_BASE_URL="/nowhere/at/all")
    assert refused(process, "/nowhere/at/all")


@pytest.mark.slow
def test_an_unreachable_database_is_one_clear_error(deployment: Deployment) -> None:
    url = f"postgresql://anna:geheim@127.0.0.1:{find_free_port()}/clinic"
    for dagster_storage in (normalise_url(url, "psycopg2"), normalise_url(deployment.url, "psycopg2"), None):
        process = ingest(deployment, DB_URL=url, DAGSTER_POSTGRES_URL=dagster_storage)
        assert refused(process, "127.0.0.1")
        assert "geheim" not in process.stderr


@pytest.mark.slow
def test_a_database_lost_during_a_load_leaves_the_tables_unchanged(
    server: SandboxServer, deployment: Deployment, postgres: str
) -> None:
    before = deployment.tables()
    name = urlsplit(deployment.url).path.removeprefix("/")
    server.reset_stats()
    server.set_faults(Fault(kind=FaultKind.SLOW, on=frozenset({RequestKind.SEARCH}), seconds=3))

    def allow_connections(anyone: bool) -> None:
        with connect(postgres, autocommit=True) as conn:
            conn.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}").format(sql.Identifier(name), anyone))
            conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])

    def disconnect() -> None:
        while not server.stats()["requests"].get(RequestKind.SEARCH):
            time.sleep(0.05)
        allow_connections(False)

    disconnecter = threading.Thread(target=disconnect)
    disconnecter.start()
    process = ingest(deployment, *NEXT_DAY)
    disconnecter.join()
    allow_connections(True)
    assert refused(process, "database")
    assert deployment.tables() == before
    server.set_faults()
    assert ingest(deployment, *NEXT_DAY).returncode == 0
    assert deployment.count_loaded() == {"Patient": 21}


@pytest.mark.slow
def test_truncated_responses_leave_the_tables_unchanged(server: SandboxServer, deployment: Deployment) -> None:
    before = deployment.tables()
    server.set_faults(Fault(kind=FaultKind.TRUNCATE, on=frozenset({RequestKind.SEARCH})))
    assert refused(ingest(deployment, *NEXT_DAY), "Patient:")
    assert deployment.tables() == before
    assert deployment.store.manifest("raw", "Patient", "2024-01-06") is None
    server.set_faults()
    assert ingest(deployment, *NEXT_DAY).returncode == 0
    assert deployment.count_loaded() == {"Patient": 21}


def test_a_store_url_that_names_a_file_is_one_clear_error(deployment: Deployment, tmp_path: Path) -> None:
    before = deployment.tables()
    (tmp_path / "store").write_bytes(b"")
    assert refused(ingest(deployment, *NEXT_DAY, FHIR_STORE_URL=str(tmp_path / "store")), str(tmp_path / "store"))
    assert deployment.tables() == before


@pytest.mark.slow
def test_a_full_disk_leaves_the_tables_and_the_store_unchanged(server: SandboxServer, deployment: Deployment) -> None:
    before = deployment.tables()
    manifests = [deployment.store.manifest(layer, "Patient", "2024-01-05") for layer in ("raw", "validated")]
    for n in range(2000):
        server.store.seed(patient(f"big{n}", DAY + timedelta(hours=20), name=FAMILY, language=os.urandom(40).hex()), 0)

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = ingest(deployment, *NEXT_DAY, prepare=limit_file_size)
    assert refused(process, "cannot write", "store")
    assert deployment.tables() == before
    assert [deployment.store.manifest(layer, "Patient", "2024-01-05") for layer in ("raw", "validated")] == manifests
    assert list((deployment.settings.home / "store" / ".spool").iterdir()) == []


def test_the_error_of_a_failed_run_is_stored_in_ingestion_runs(server: SandboxServer, deployment: Deployment) -> None:
    server.set_faults(Fault(kind=FaultKind.ERROR, on=frozenset({RequestKind.SEARCH}), status=403))
    assert refused(ingest(deployment, *NEXT_DAY), "Patient:", "403")
    errors = deployment.query(
        "SELECT DISTINCT status, error LIKE '%%403%%', seconds > 0 FROM ops.ingestion_runs WHERE error <> ''"
    )
    assert errors == [("FAILED", True, True)]
