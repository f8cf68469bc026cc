"""The API as a process of its own, over real HTTP, on the test's own database and folders."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import requests
import uvicorn

from fhir_assets.api.app import create_app
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.conftest import fresh_database

ROLES = ("reader", "operator", "ingester", "admin")


def secret(role: str) -> str:
    """The token of a role, in tests."""
    return f"the-secret-of-{role}"


TOKENS = ",".join(f"{role}:{role}:{hashlib.sha256(secret(role).encode()).hexdigest()}" for role in ROLES)


@dataclass
class Api:
    """A running API; calls bear the token of a role, or another one, or none."""

    url: str
    settings: Settings
    log: Path

    def call(
        self, method: str, path: str, *, role: str | None = "admin", headers: dict[str, str] | None = None, **more: Any
    ) -> requests.Response:
        given = {"Authorization": f"Bearer {secret(role)}"} if role else {}
        return requests.request(method, f"{self.url}{path}", headers={**given, **(headers or {})}, timeout=120, **more)

    def get(self, path: str, **more: Any) -> requests.Response:
        return self.call("GET", path, **more)

    def post(self, path: str, **more: Any) -> requests.Response:
        return self.call("POST", path, **more)


Serve = Callable[..., Api]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(settings: dict[str, object]) -> dict[str, str]:
    """The settings as environment variables, beside those that a process needs at all."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("FHIR_", "API_", "DB_URL", "PHI_"))
    }
    return {**kept, **{name.upper(): str(value) for name, value in settings.items()}}


def values(database: str, folder: Path, more: dict[str, object]) -> dict[str, object]:
    """The settings of a test's API."""
    return {
        "db_url": database,
        "fhir_assets_home": folder / "home",
        "fhir_landing_url": str(folder / "landing"),
        "fhir_resource_types": "Patient,Encounter,Observation,Consent",
        "api_tokens": TOKENS,
        "api_rate_limit": 10_000,
        "metrics_port": 0,
        "dagster_webserver_url": f"http://127.0.0.1:{free_port()}",
        **more,
    }


@contextmanager
def served(settings: Settings) -> Iterator[Api]:
    """The API in threads of this process, over real HTTP: up at once."""
    config = uvicorn.Config(create_app(settings), host="127.0.0.1", port=0, log_config=None)
    server = uvicorn.Server(config)
    thread = Thread(target=server.run, name="api", daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Api(f"http://127.0.0.1:{port}", settings, settings.home / "none.log")
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def serve_here(database: str, tmp_path: Path) -> Iterator[Serve]:
    """As ``serve``, in threads of this process."""
    with ExitStack() as running:

        def start(**more: object) -> Api:
            (tmp_path / "landing").mkdir(exist_ok=True)
            return running.enter_context(served(load_settings(**values(database, tmp_path, more))))

        yield start


@contextmanager
def api_process(given: dict[str, object], folder: Path, *, workers: int = 1) -> Iterator[Api]:
    """`fhir-assets api` as a process of its own, with settings by name."""
    port = free_port()
    log = folder / f"api-{port}.log"
    command = [str(Path(sys.executable).with_name("fhir-assets")), "api", "--port", str(port)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, "--workers", str(workers)], env=environment(given), stdout=output, stderr=output, cwd=folder
        )
    try:
        api = Api(f"http://127.0.0.1:{port}", load_settings(**given), log)
        for _ in range(600):
            try:
                if requests.get(f"{api.url}/health/live", timeout=5).ok:
                    break
            except requests.ConnectionError:
                pass
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        else:
            raise AssertionError(f"the API does not answer: {log.read_text()}")
        yield api
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def serve(database: str, tmp_path: Path) -> Iterator[Serve]:
    """Starts `fhir-assets api`; settings by name."""
    with ExitStack() as running:

        def start(*, workers: int = 1, **more: object) -> Api:
            (tmp_path / "landing").mkdir(exist_ok=True)
            return running.enter_context(api_process(values(database, tmp_path, more), tmp_path, workers=workers))

        yield start


@pytest.fixture(scope="module")
def shared_api(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One process for the tests of a module: starting it takes longer than they do."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "landing").mkdir()
    with fresh_database(postgres) as database, api_process(values(database, folder, {}), folder) as api:
        yield api


@pytest.fixture
def api(shared_api: Api) -> Api:
    """The module's API, which has received nothing yet."""
    assert shared_api.settings.db_url
    with connect(shared_api.settings.db_url.get_secret_value()) as conn:
        conn.execute("TRUNCATE ops.received, ops.idempotency")
    shutil.rmtree(Path(shared_api.settings.store_url) / "raw", ignore_errors=True)
    shared_api.log.write_bytes(b"")
    return shared_api
