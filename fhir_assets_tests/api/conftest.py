"""The API as a process of its own, over real HTTP, on the test's own database and folders."""

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from fhir_assets.settings import Settings, load_settings

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


@pytest.fixture
def serve(database: str, tmp_path: Path) -> Iterator[Serve]:
    """Starts `fhir-assets api`; settings by name."""
    processes = []

    def start(*, workers: int = 1, **more: object) -> Api:
        port = free_port()
        (tmp_path / "landing").mkdir(exist_ok=True)
        values: dict[str, object] = {
            "db_url": database,
            "fhir_assets_home": tmp_path / "home",
            "fhir_landing_url": str(tmp_path / "landing"),
            "fhir_resource_types": "Patient,Encounter,Observation,Consent",
            "api_tokens": TOKENS,
            "api_rate_limit": 10_000,
            "dagster_webserver_url": f"http://127.0.0.1:{free_port()}",
            **more,
        }
        log = tmp_path / f"api-{port}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("fhir-assets")),
                    "api",
                    "--port",
                    str(port),
                    "--workers",
                    str(workers),
                ],
                env=environment(values),
                stdout=output,
                stderr=output,
                cwd=tmp_path,
            )
        processes.append(process)
        api = Api(f"http://127.0.0.1:{port}", load_settings(**values), log)
        for _ in range(600):
            try:
                if requests.get(f"{api.url}/health/live", timeout=5).ok:
                    return api
            except requests.ConnectionError:
                pass
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        raise AssertionError(f"the API does not answer: {log.read_text()}")

    yield start
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(30)
