"""The services of docker-compose.yml, run as processes with the commands and variables of the file.

Names and ports of the services are replaced by those of this machine; Postgres is that of the tests, and the S3 server
of moto takes the place of MinIO. `.env` is the one that the documentation shows.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
import yaml

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets_tests.support.daemon import wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PASSWORD = "p@ss:w/rd#%&?"
LANDED = b'{"resourceType":"Patient","id":"landed"}\n'

QUERY = """{
    workspaceOrError { ... on Workspace { locationEntries { name loadStatus locationOrLoadError { __typename } } } }
    instance { daemonHealth { allDaemonStatuses { daemonType required healthy } } }
}"""


VARIABLE = re.compile(r"\$\{(\w+)(?::[-?]((?:[^${}]|\$\{\w+\})*))?\}")
"""A variable of the compose file, with its default or its error message."""


def read_documented_env() -> dict[str, str]:
    """Return the variables of `.env` that the documentation shows for the profile s3, with a password."""
    text = (ROOT / "docs" / "getting_started.md").read_text()
    variables = dict(re.findall(r"^([A-Z][A-Z0-9_]+)=(\S*)", text, re.MULTILINE))
    assert {"AWS_ENDPOINT_URL", "FHIR_LANDING_URL", "FHIR_STORE_URL"} <= variables.keys()
    return {**variables, "AWS_SECRET_ACCESS_KEY": PASSWORD}


class Services:
    """Runs services of the compose file in ``folder``, which stands for the file system of the image."""

    def __init__(self, folder: Path, database: str) -> None:
        self._folder = folder
        self._services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
        self._ports = {port: str(find_free_port()) for port in ("4000", "3000", "8080", "9464", "9000")}
        self._database = database.partition("//")[2]
        self._env = {"POSTGRES_PASSWORD": PASSWORD, **read_documented_env()}
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
        subprocess.run(self._command(name), env=self.environment(name), cwd=self._folder, check=True)

    @contextmanager
    def start(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a service during the block. Fail if it ends by itself."""
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                self._command(name), env=self.environment(name), cwd=self._folder, stdout=log, stderr=log
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

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of a service: what the image sets, `.env`, and what the compose file sets."""
        service = self._services[name]
        variables = {key: self._localize(str(value)) for key, value in service["environment"].items()}
        if "env_file" not in service:
            return {**os.environ, **variables}
        return {
            **os.environ,
            "FHIR_ASSETS_HOME": str(self._folder),
            "FHIR_STORE_URL": str(self._folder / "store"),
            # Their runs start in half the time of those of all types.
            "FHIR_RESOURCE_TYPES": "Patient,Encounter",
            "API_TOKENS": f"anna:admin:{hashlib.sha256(b'secret').hexdigest()}",
            **{key: self._localize(value) for key, value in self._env.items()},
            **variables,
        }

    def _command(self, name: str) -> list[str]:
        program, *arguments = shlex.split(self._localize(self._services[name]["command"]))
        if name == "s3":
            assert (program, *arguments) == ("server", "/data")
            return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", self._ports["9000"]]
        return [str(Path(sys.executable).with_name(program)), *arguments]

    def _localize(self, text: str) -> str:
        """Replace variables of the file, names and ports of services, and folders of the image."""
        while VARIABLE.search(text):
            text = VARIABLE.sub(lambda match: self._env.get(match[1], match[2] or ""), text)
        text = re.sub(r"fhir@postgres:5432/(fhir_assets|dagster)\b", lambda match: self._database, text)
        text = re.sub(r"\b(webserver|code_location|s3)(?=:\s*\d|$)", "127.0.0.1", text, flags=re.MULTILINE)
        text = text.replace("0.0.0.0", "127.0.0.1").replace("/var/lib/fhir_assets", str(self._folder))
        return re.sub(r"\b(4000|3000|8080|9464|9000)\b", lambda match: self._ports[match[1]], text)


def responds(url: str, token: str = "") -> bool:
    with suppress(requests.RequestException):
        return requests.get(url, headers={"Authorization": f"Bearer {token}"} if token else {}, timeout=30).ok
    return False


def connect_to_s3(environment: Mapping[str, str]) -> Any:
    """Return a client of the S3 server that an environment names."""
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )


def test_the_services_of_compose_start_find_each_other_and_load_what_lands_in_the_bucket(
    tmp_path: Path, empty_database: str
) -> None:
    services = Services(tmp_path, empty_database)
    environment = services.environment("daemon")
    server = services.environment("s3")
    assert [server[name] for name in ("MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD")] == [
        environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    ]
    services.run("migrate")
    with ExitStack() as stack:
        stack.enter_context(services.start("s3"))
        wait_until(lambda: responds(environment["AWS_ENDPOINT_URL"]), seconds=60)
        services.run("s3_bucket")
        bucket, _, prefix = environment["FHIR_LANDING_URL"].removeprefix("s3://").partition("/")
        connect_to_s3(environment).put_object(Bucket=bucket, Key=f"{prefix}/patients.ndjson", Body=LANDED)
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
                    and responds(f"{services.api}/health/ready")
                )
            return False

        wait_until(is_up, seconds=300)
        wait_until(lambda: responds(f"{services.api}/patients/landed", "secret"), seconds=300)
        store, _, prefix = environment["FHIR_STORE_URL"].removeprefix("s3://").partition("/")
        stored = connect_to_s3(environment).list_objects_v2(Bucket=store, Prefix=f"{prefix}/")
        assert stored["KeyCount"] > 0
    assert not (tmp_path / "store").exists()
