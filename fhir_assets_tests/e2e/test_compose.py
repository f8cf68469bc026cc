"""The services of docker-compose.yml, run as processes with the commands and variables of the file.

Names and ports of the services are replaced by those of this machine; Postgres is that of the tests.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from fhir_assets.cli.dev import free_port
from fhir_assets_tests.support.daemon import wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PASSWORD = "p@ss:w/rd#%&?"

QUERY = """{
    workspaceOrError { ... on Workspace { locationEntries { name loadStatus locationOrLoadError { __typename } } } }
    instance { daemonHealth { allDaemonStatuses { daemonType required healthy } } }
}"""


class Services:
    """Runs services of the compose file in ``folder``, which stands for the file system of the image."""

    def __init__(self, folder: Path, database: str) -> None:
        self._folder = folder
        self._services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
        self._ports = {port: str(free_port(0)) for port in ("4000", "3000", "8080", "9464")}
        self._database = database.partition("//")[2]
        (folder / "deploy").mkdir()
        (folder / "dagster").mkdir()
        for file in ("deploy/workspace.yaml", "workspace.yaml"):
            (folder / file).write_text(self._localize((ROOT / file).read_text()))
        shutil.copy(ROOT / "dagster.yaml", folder / "dagster")

    @property
    def webserver(self) -> str:
        return f"http://127.0.0.1:{self._ports['3000']}"

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self._ports['8080']}"

    def run(self, name: str) -> None:
        """Run a service to its end."""
        subprocess.run(self._command(name), env=self._environment(name), cwd=self._folder, check=True)

    @contextmanager
    def start(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a service during the block. Fail if it ends by itself."""
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                self._command(name), env=self._environment(name), cwd=self._folder, stdout=log, stderr=log
            )
            try:
                yield process
                assert process.poll() is None, (self._folder / f"{name}.log").read_text()
            finally:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                process.kill()
                process.wait()

    def _command(self, name: str) -> list[str]:
        program, *arguments = shlex.split(self._localize(self._services[name]["command"]))
        return [str(Path(sys.executable).with_name(program)), *arguments]

    def _environment(self, name: str) -> dict[str, str]:
        variables = {key: self._localize(str(value)) for key, value in self._services[name]["environment"].items()}
        return {
            **os.environ,
            "FHIR_ASSETS_HOME": str(self._folder),
            "FHIR_STORE_URL": str(self._folder / "store"),
            "API_TOKENS": f"anna:admin:{hashlib.sha256(b'secret').hexdigest()}",
            **variables,
        }

    def _localize(self, text: str) -> str:
        """Replace variables of the file, names and ports of services, and folders of the image."""
        text = re.sub(r"\$\{POSTGRES_PASSWORD\b[^}]*\}", PASSWORD, text)
        text = re.sub(r"\$\{FHIR_DAGSTER_HOME:-(\w+)\}", r"\1", text)
        text = re.sub(r"fhir@postgres:5432/(fhir_assets|dagster)\b", lambda match: self._database, text)
        text = re.sub(r"\b(webserver|code_location)(?=:\s*\d|$)", "127.0.0.1", text, flags=re.MULTILINE)
        text = text.replace("0.0.0.0", "127.0.0.1").replace("/var/lib/fhir_assets", str(self._folder))
        return re.sub(r"\b(4000|3000|8080|9464)\b", lambda match: self._ports[match[1]], text)


def test_the_services_of_compose_start_and_find_each_other(tmp_path: Path, empty_database: str) -> None:
    services = Services(tmp_path, empty_database)
    services.run("migrate")
    with ExitStack() as stack:
        names = ("code_location", "webserver", "daemon", "api", "post_loader")
        processes = [stack.enter_context(services.start(name)) for name in names]

        def is_up() -> bool:
            assert [name for name, process in zip(names, processes, strict=True) if process.poll() is not None] == []
            with suppress(requests.RequestException):
                data = requests.post(f"{services.webserver}/graphql", json={"query": QUERY}, timeout=30).json()["data"]
                (location,) = data["workspaceOrError"]["locationEntries"]
                daemons = data["instance"]["daemonHealth"]["allDaemonStatuses"]
                return (
                    location["name"] == "fhir_assets"
                    and location["locationOrLoadError"]
                    and location["locationOrLoadError"]["__typename"] == "RepositoryLocation"
                    and all(daemon["healthy"] for daemon in daemons if daemon["required"])
                    and requests.get(f"{services.api}/health/ready", timeout=30).ok
                )
            return False

        wait_until(is_up, seconds=300)
