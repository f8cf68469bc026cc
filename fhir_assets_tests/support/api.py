"""The HTTP API under test: started in threads or as a process, and called over real HTTP."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Any

import requests
import uvicorn

from fhir_assets.api.app import create_app
from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.connection_limits import LimitedProtocol
from fhir_assets.settings import Settings, load_settings

ROLES = ("reader", "registrar", "operator", "ingester", "auditor", "admin")


def role_secret(role: str) -> str:
    """Return the secret of the token that tests use for a role."""
    return f"the-secret-of-{role}"


TOKENS = ",".join(f"{role}:{role}:{hashlib.sha256(role_secret(role).encode()).hexdigest()}" for role in ROLES)
"""API_TOKENS with one token for each role, named like the role."""


@dataclass
class Api:
    """A running API. Calls send the token of a role; with ``role=None`` they send no token."""

    url: str
    settings: Settings
    log: Path
    process: "subprocess.Popen[bytes] | None" = None

    def call(
        self, method: str, path: str, *, role: str | None = "admin", headers: dict[str, str] | None = None, **more: Any
    ) -> requests.Response:
        """Send a request. ``more`` are arguments of ``requests.request``."""
        authorization = {"Authorization": f"Bearer {role_secret(role)}"} if role else {}
        return requests.request(
            method, f"{self.url}{path}", headers={**authorization, **(headers or {})}, timeout=120, **more
        )

    def get(self, path: str, **more: Any) -> requests.Response:
        """Send a GET request."""
        return self.call("GET", path, **more)

    def post(self, path: str, **more: Any) -> requests.Response:
        """Send a POST request."""
        return self.call("POST", path, **more)


Serve = Callable[..., Api]
"""A function that starts an API with the settings given by name."""


def api_environment(settings: dict[str, object]) -> dict[str, str]:
    """Return the environment of a process: that of this process, with ``settings`` in place of its own settings."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("FHIR_", "API_", "DB_URL", "PHI_"))
    }
    return {**inherited, **{name.upper(): str(value) for name, value in settings.items()}}


def api_settings(database: str, folder: Path, more: dict[str, object]) -> dict[str, object]:
    """Return the settings of a test's API by name: on ``database``, with its files in ``folder``."""
    return {
        "db_url": database,
        "fhir_assets_home": folder / "home",
        "fhir_landing_url": str(folder / "landing"),
        "fhir_resource_types": "Patient,Encounter,Observation,Consent",
        "api_tokens": TOKENS,
        "api_rate_limit": 10_000,
        "metrics_port": 0,
        "dagster_webserver_url": f"http://127.0.0.1:{find_free_port()}",
        **more,
    }


@contextmanager
def api_in_threads(settings: Settings) -> Iterator[Api]:
    """Serve the API over real HTTP from threads of this process. It starts faster than a process."""
    config = uvicorn.Config(create_app(settings), host="127.0.0.1", port=0, log_config=None, http=LimitedProtocol)
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


@contextmanager
def api_process(
    settings: dict[str, object],
    folder: Path,
    *,
    workers: int = 1,
    port: int | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Api]:
    """Run `fhir-assets api` as a process with settings by name; its output is a log file in ``folder``.

    It listens on a free port unless ``port`` is given. ``environment`` has variables that are no settings.
    """
    port = port or find_free_port()
    log = folder / f"api-{port}.log"
    command = [str(Path(sys.executable).with_name("fhir-assets")), "api", "--port", str(port)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, "--workers", str(workers)],
            env={**api_environment(settings), **environment},
            stdout=output,
            stderr=output,
            cwd=folder,
        )
    try:
        api = Api(f"http://127.0.0.1:{port}", load_settings(**settings), log, process)
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
        assert process.poll() is None, f"another process answers on the port: {log.read_text()}"
        yield api
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def api_processes(database: str, folder: Path) -> Iterator[Serve]:
    """Yield a function that starts `fhir-assets api` processes; stop them at the end."""
    with ExitStack() as running:

        def start(*, workers: int = 1, **more: object) -> Api:
            (folder / "landing").mkdir(exist_ok=True)
            return running.enter_context(api_process(api_settings(database, folder, more), folder, workers=workers))

        yield start
