"""`fhir-assets reader`: BI tools connect to the embedded Postgres by TCP, as a login that may only read tables."""

import json
import re
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import polars
import psutil
import psycopg
import pytest
from typer.testing import CliRunner

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.cli.main import app
from fhir_assets.errors import ConfigurationError
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.postgres.db import embedded, reader_login
from fhir_assets.warehouse.postgres.db.connections import Connection, connect
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets_tests.support.shipped_views import views_of_type

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fhir_assets_reader_") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder) / "home"
        embedded.stop(Path(folder) / "home")


@pytest.fixture
def port(home: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """A free port, which FHIR_POSTGRES_PORT is set to."""
    number = find_free_port()
    monkeypatch.delenv("DB_URL", raising=False)
    monkeypatch.setenv("FHIR_ASSETS_HOME", str(home))
    monkeypatch.setenv("FHIR_POSTGRES_PORT", str(number))
    return number


def call_reader() -> dict[str, Any]:
    """Call `fhir-assets reader --json`, create the tables of Patient, and return what the command printed."""
    result = CliRunner().invoke(app, ["reader", "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.output)
    home = Path(facts["password_file"]).parent
    with connect(embedded.ensure(home, port=facts["port"]), cipher=NO_ENCRYPTION) as conn:
        view_tables.ensure_tables(conn, views_of_type("Patient"))
    return facts


def find_server(conn: Connection) -> psutil.Process:
    """Return the main process of the server of a connection."""
    return psutil.Process(psutil.Process(conn.info.backend_pid).ppid())


def is_refused(url: str, statement: str) -> bool:
    with closing(psycopg.connect(url)) as conn:
        try:
            conn.execute(statement.encode())
        except psycopg.errors.InsufficientPrivilege:
            return True
    return False


def test_the_login_reads_tables_and_marts_and_nothing_else(port: int) -> None:
    facts = call_reader()
    assert (facts["host"], facts["port"], facts["user"]) == ("127.0.0.1", port, "reader")
    with closing(psycopg.connect(facts["url"])) as conn:
        assert conn.execute("SELECT count(*) FROM fhir.patient").fetchone() == (0,)
        assert conn.execute("SELECT count(*) FROM marts.patient_current").fetchone() == (0,)
        listed = conn.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = 'fhir'")
        names = {name for (name,) in listed}
    assert "patient" in names
    assert not [name for name in names if name.startswith("resource")], "tools list only what the login may read"
    for statement in (
        "SELECT FROM fhir.resource",
        "SELECT FROM fhir_partitions.resource_patient",
        "SELECT FROM ops.dead_letters",
        "SELECT FROM ops.encryption",
        "DELETE FROM fhir.patient",
        "CREATE TABLE fhir.mine (x int)",
        "CREATE TABLE public.mine (x int)",
        "CREATE ROLE mine",
        "COPY (SELECT 1) TO PROGRAM 'cat'",
        "SET ROLE fhir_loader",
    ):
        assert is_refused(facts["url"], statement), statement


@pytest.mark.parametrize(
    ("user", "password", "database"),
    [
        ("reader", None, "fhir_assets"),
        ("reader", "wrong", "fhir_assets"),
        ("postgres", None, "fhir_assets"),
        ("reader", "right", "dagster"),
        ("loader", "right", "fhir_assets"),
    ],
)
def test_other_connections_are_refused(port: int, user: str, password: str | None, database: str) -> None:
    facts = call_reader()
    with connect(embedded.ensure(Path(facts["password_file"]).parent, port=port), autocommit=True) as conn:
        conn.execute("DROP ROLE IF EXISTS loader")
        conn.execute("CREATE ROLE loader LOGIN PASSWORD 'right' IN ROLE fhir_loader")
    if password == "right" and user == "reader":
        password = facts["password"]
    with pytest.raises(psycopg.OperationalError, match=r"password|pg_hba\.conf|no entry"):
        psycopg.connect(host="127.0.0.1", port=port, user=user, password=password, dbname=database, passfile="/none")


def test_polars_reads_a_mart_by_the_lines_of_the_documentation(port: int) -> None:
    facts = call_reader()
    with closing(psycopg.connect(facts["url"])) as conn:
        found = polars.read_database("SELECT * FROM marts.patient_current", conn, infer_schema_length=None)
    assert found.height == 0
    assert {"id", "birth_date", "age"} <= set(found.columns)


def test_it_listens_on_loopback_only(home: Path, port: int) -> None:
    call_reader()
    with connect(embedded.ensure(home, port=port)) as conn:
        found = find_server(conn).net_connections("inet")
    assert {(item.laddr.ip, item.laddr.port) for item in found if item.status == psutil.CONN_LISTEN} == {
        ("127.0.0.1", port)
    }


def test_the_password_is_in_a_private_file_and_survives_a_restart(home: Path, port: int) -> None:
    first = call_reader()
    file = Path(first["password_file"])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(first["password"]) >= 32
    assert file.read_text() == first["password"] + "\n"
    embedded.stop(home)
    embedded.ensure(home, port=port)
    psycopg.connect(first["url"]).close()
    assert call_reader() == first
    printed = CliRunner().invoke(app, ["reader"], catch_exceptions=False).output
    assert first["password"] in printed
    assert first["url"] in printed


def test_logins_that_are_created_together_have_one_password(home: Path, port: int) -> None:
    first = call_reader()
    Path(first["password_file"]).unlink()

    def create(_: int) -> str:
        with connect(embedded.ensure(home, port=port)) as conn:
            return reader_login.ensure(conn, home).password

    with ThreadPoolExecutor(4) as pool:
        [password] = set(pool.map(create, range(4)))
    assert password != first["password"]
    psycopg.connect(host="127.0.0.1", port=port, user="reader", password=password, dbname="fhir_assets").close()
    assert [path.name for path in home.glob(".*reader*")] == []


def test_a_changed_port_restarts_an_unused_server_and_earlier_urls_stay_valid(
    home: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = call_reader()
    url = embedded.ensure(home, port=port)
    other = find_free_port()
    monkeypatch.setenv("FHIR_POSTGRES_PORT", str(other))
    with closing(psycopg.connect(first["url"])):
        result = CliRunner().invoke(app, ["reader"])
        assert isinstance(result.exception, ConfigurationError)
        assert re.search(rf"listens on port {port}, .* is in use: stop", str(result.exception))
        assert first["password"] not in result.output
    second = call_reader()
    psycopg.connect(second["url"]).close()
    psycopg.connect(url).close()
    assert second["password"] == first["password"]
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(first["url"])
    assert embedded.ensure(home) == url, "without the setting it has only its socket"
    assert embedded.find_port(home) is None
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(second["url"])


def test_a_taken_port_is_an_error_that_names_the_setting_and_leaves_the_server_running(home: Path, port: int) -> None:
    url = embedded.ensure(home)
    with socket.create_server(("127.0.0.1", port)):
        result = CliRunner().invoke(app, ["reader"])
        assert isinstance(result.exception, ConfigurationError)
        assert f"127.0.0.1:{port} (another program uses the port): set FHIR_POSTGRES_PORT" in str(result.exception)
        psycopg.connect(url).close()
        embedded.stop(home)
        with pytest.raises(ConfigurationError, match="set FHIR_POSTGRES_PORT to another port"):
            embedded.ensure(home, port=port)
    assert call_reader()["port"] == port


def test_a_server_that_was_killed_starts_again_on_its_port(home: Path, port: int) -> None:
    facts = call_reader()
    with connect(embedded.ensure(home, port=port)) as conn:
        find_server(conn).kill()
    embedded.ensure(home, port=port)
    psycopg.connect(facts["url"]).close()


def test_a_start_waits_for_the_processes_of_a_killed_server_that_still_hold_its_port(home: Path, port: int) -> None:
    url = embedded.ensure(home, port=port)
    with connect(url) as conn:
        ((data,),) = conn.execute("SHOW data_directory").fetchall()
    embedded.stop(home)
    with running_child(Path(data), port):
        assert embedded.ensure(home, port=port) == url
    psycopg.connect(url).close()


@contextmanager
def running_child(data: Path, port: int) -> Iterator[None]:
    """A process that looks as a new child process of a killed server does, holds the port and ends after a second."""
    program = """
import ctypes, socket, time
ctypes.CDLL(None).prctl(15, b"postgres")
listener = socket.create_server(("127.0.0.1", int(__import__("sys").argv[1])))
print("ready", flush=True)
time.sleep(1)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(port)], cwd=data, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield


def test_without_the_setting_or_with_db_url_the_error_says_what_to_do(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FHIR_POSTGRES_PORT")
    assert "set it to a free port" in str(CliRunner().invoke(app, ["reader"]).exception)
    monkeypatch.setenv("DB_URL", "postgresql://db.example/fhir")
    assert "IN ROLE fhir_reader" in str(CliRunner().invoke(app, ["reader"]).exception)
