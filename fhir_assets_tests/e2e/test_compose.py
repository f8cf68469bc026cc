"""The services of docker-compose.yml, run as processes with the commands and variables of the file.

Names and ports of the services are replaced by those of this machine; Postgres is one that asks each login for its
password, and the S3 server of moto takes the place of MinIO. `.env` is that of the documentation, with passwords.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
import yaml
from psycopg import sql

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets.warehouse.postgres.db.connections import connect, with_database
from fhir_assets_tests.support.daemon import wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PATIENCE = 1800
"""The seconds after which a wait is given up. It is long, because a loaded machine starts eight processes in minutes; a
process that ends fails the test at once."""
PASSWORD = "p@ss:w/rd#%&?"
LANDED = b'{"resourceType":"Patient","id":"landed"}\n'

QUERY = """{
    workspaceOrError { ... on Workspace { locationEntries { name loadStatus locationOrLoadError { __typename } } } }
    instance { daemonHealth { allDaemonStatuses { daemonType required healthy } } }
}"""


PASSWORDS = (
    "POSTGRES_PASSWORD",
    *(f"POSTGRES_{name}_PASSWORD" for name in ("LOADER", "DAGSTER", "API", "CONNECTOR", "OPERATOR")),
)

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
        self._database_host = database.partition("?")[2]
        self._env = {**{name: f"{PASSWORD}{name}" for name in PASSWORDS}, **read_documented_env()}
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

    def set(self, variable: str, value: str) -> None:
        """Set a variable of `.env`."""
        self._env[variable] = value

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
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FHIR_ASSETS_HOME": str(self._folder),
            "FHIR_STORE_URL": str(self._folder / "store"),
            # Their runs start in half the time of those of all types.
            "FHIR_RESOURCE_TYPES": "Patient,Encounter",
            "API_TOKENS": f"anna:admin:{hashlib.sha256(b'secret').hexdigest()}",
            **{key: self._localize(value) for key, value in self._env.items()},
            **variables,
            # In a container each has a port of its own.
            "METRICS_PORT": str(find_free_port()),
        }

    def _command(self, name: str) -> list[str]:
        program, *arguments = shlex.split(self._localize(self._services[name]["command"]))
        if program == "sh":
            return [program, *arguments]
        if name == "s3":
            assert (program, *arguments) == ("server", "/data")
            return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", self._ports["9000"]]
        return [str(Path(sys.executable).with_name(program)), *arguments]

    def _localize(self, text: str) -> str:
        """Replace variables of the file, names and ports of services, and folders of the image."""
        while VARIABLE.search(text):
            text = VARIABLE.sub(lambda match: self._env.get(match[1], match[2] or ""), text)
        text = re.sub(
            r"@postgres:5432/(fhir_assets|dagster)\b", lambda match: f"@/{match[1]}?{self._database_host}", text
        )
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


@pytest.fixture
def server() -> Iterator[str]:
    """The URL of a Postgres as its image makes it: with the superuser ``fhir``, and a password for every login."""
    home = Path(tempfile.mkdtemp(prefix="fhir_assets_test_compose_"))
    home.chmod(0o711)
    try:
        url = embedded.ensure(home)
        with connect(url, autocommit=True) as conn:
            conn.execute(sql.SQL("CREATE ROLE fhir SUPERUSER LOGIN PASSWORD {}").format(f"{PASSWORD}POSTGRES_PASSWORD"))
            conn.execute("ALTER DATABASE fhir_assets OWNER TO fhir")
            (rules,) = conn.execute("SHOW hba_file").fetchall()[0]
            Path(rules).write_text("local all postgres trust\nlocal all all scram-sha-256\n")
            conn.execute("SELECT pg_reload_conf()")
        yield url
    finally:
        embedded.stop(home)
        shutil.rmtree(home, ignore_errors=True)


def find_logins(server: str) -> set[tuple[str, str]]:
    """Return the databases in which services are connected, with their logins."""
    with connect(server) as conn:
        rows = conn.execute(
            """
            SELECT DISTINCT datname::text, usename::text
            FROM pg_stat_activity
            WHERE backend_type = 'client backend' AND usename <> 'postgres'
            """
        )
        return {(database, login) for database, login in rows.fetchall()}


def is_ready(webserver: str) -> bool:
    """Return whether the UI knows the code location, and all daemons that are needed run."""
    with suppress(requests.RequestException):
        data = requests.post(f"{webserver}/graphql", json={"query": QUERY}, timeout=60).json().get("data") or {}
        loaded = [
            entry["name"]
            for entry in data.get("workspaceOrError", {}).get("locationEntries", [])
            if (entry["locationOrLoadError"] or {}).get("__typename") == "RepositoryLocation"
        ]
        daemons = data.get("instance", {}).get("daemonHealth", {}).get("allDaemonStatuses", [])
        return loaded == ["fhir_assets"] and all(daemon["healthy"] for daemon in daemons if daemon["required"])
    return False


def test_the_services_of_compose_start_find_each_other_and_load_what_lands_in_the_bucket(
    tmp_path: Path, server: str
) -> None:
    services = Services(tmp_path, server)
    environment = services.environment("daemon")
    s3 = services.environment("s3")
    assert [s3[name] for name in ("MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD")] == [
        environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    ]
    services.run("migrate")
    with ExitStack() as stack:
        stack.enter_context(services.start("s3"))
        wait_until(lambda: responds(environment["AWS_ENDPOINT_URL"]), seconds=PATIENCE)
        services.run("s3_bucket")
        bucket, _, prefix = environment["FHIR_LANDING_URL"].removeprefix("s3://").partition("/")
        connect_to_s3(environment).put_object(Bucket=bucket, Key=f"{prefix}/patients.ndjson", Body=LANDED)
        names = ("code_location", "webserver", "daemon", "api", "post_loader")
        processes = [stack.enter_context(services.start(name)) for name in names]
        logins: set[tuple[str, str]] = set()

        def holds(condition: Callable[[], bool]) -> bool:
            ended = [name for name, process in zip(names, processes, strict=True) if process.poll() is not None]
            assert ended == [], [(tmp_path / f"{name}.log").read_text()[-3000:] for name in ended]
            logins.update(find_logins(server))
            return condition()

        ready = f"{services.api}/health/ready"
        wait_until(lambda: holds(lambda: is_ready(services.webserver) and responds(ready)), seconds=PATIENCE)
        # As another `docker compose up` does, beside the services that run.
        services.run("migrate")
        posted = requests.post(
            f"{services.api}/api/v1/ingest",
            json={"records": [{"resourceType": "Patient", "id": "posted"}]},
            headers={"Authorization": "Bearer secret"},
            timeout=600,
        )
        assert posted.ok, posted.text
        for patient in ("landed", "posted"):
            address = f"{services.api}/patients/{patient}"
            wait_until(lambda: holds(lambda: responds(address, "secret")), seconds=PATIENCE)  # noqa: B023
        store, _, prefix = environment["FHIR_STORE_URL"].removeprefix("s3://").partition("/")
        stored = connect_to_s3(environment).list_objects_v2(Bucket=store, Prefix=f"{prefix}/")
        assert stored["KeyCount"] > 0
    assert not (tmp_path / "store").exists()
    # Neither the owner's login nor one of a service that did not run.
    assert logins == {
        ("fhir_assets", "fhir_assets_loader"),
        ("fhir_assets", "fhir_assets_api"),
        ("dagster", "fhir_assets_dagster"),
    }
    with connect(with_database(server, "dagster")) as conn:
        refused = conn.execute(
            """
            SELECT tick_body FROM job_ticks WHERE tick_body LIKE '%lacks a right%'
            UNION ALL
            SELECT event FROM event_logs WHERE event LIKE '%lacks a right%' OR event LIKE '%permission denied%'
            """
        )
        assert refused.fetchall() == []
    assert [name for name in names if "lacks a right" in (tmp_path / f"{name}.log").read_text()] == []


def is_refused(environment: Mapping[str, str], password: str) -> bool:
    """Return whether the login of a service is refused with a password."""
    result = subprocess.run(
        [Path(sys.executable).with_name("fhir-assets"), "runs", "list"],
        env={**environment, "DB_PASSWORD": password},
        capture_output=True,
        text=True,
    )
    return result.returncode == 78 and "the user or the password in DB_URL is wrong" in result.stderr


def test_the_connector_and_the_metrics_of_compose_work_with_their_own_logins(tmp_path: Path, server: str) -> None:
    services = Services(tmp_path, server)
    services.run("migrate")
    services.run("connector_install")
    connector, metrics = (services.environment(name) for name in ("connector", "metrics"))
    assert is_refused(connector, metrics["DB_PASSWORD"])
    assert is_refused(metrics, connector["DB_PASSWORD"])
    assert not is_refused(metrics, metrics["DB_PASSWORD"])
    with connect(server) as conn:
        conn.execute("INSERT INTO health.patient (identifier_system, identifier_value) VALUES ('urn:mrn', '1')")
    with SandboxServer([]) as target, ExitStack() as stack:
        services.set("CONNECTOR_URL", target.url)
        processes = [stack.enter_context(services.start(name)) for name in ("connector", "metrics")]

        def is_delivered() -> bool:
            assert [process.poll() for process in processes] == [None, None]
            with connect(server) as conn:
                return conn.execute("SELECT FROM health.fhir_delivered").fetchone() is not None

        wait_until(is_delivered, seconds=PATIENCE)
        text = read_metrics(tmp_path / "metrics.log")
        assert "fhir_database_up 1.0" in text
        assert "fhir_outbox" in text
        logins = find_logins(server)
    assert {login for _, login in logins} <= {"fhir_assets_connector", "fhir_assets_operator", "fhir_assets_dagster"}


def read_metrics(log: Path) -> str:
    """Return the metrics at the address that a process logs when it serves them."""
    wait_until(lambda: re.search(r"http://\S+/metrics", log.read_text()) is not None, seconds=PATIENCE)
    return requests.get(re.findall(r"http://\S+/metrics", log.read_text())[0], timeout=600).text
