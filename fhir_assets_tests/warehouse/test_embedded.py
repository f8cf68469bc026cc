"""The embedded Postgres with several processes, kills, unusual folders, and as root."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError, DatabaseUnavailable
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.ops import audit_log
from fhir_assets.warehouse.postgres.db import embedded, migrations, schema_state
from fhir_assets.warehouse.postgres.db.connections import connect

pytestmark = pytest.mark.slow

_PRINT_URL = """
import sys
from pathlib import Path
from fhir_assets.warehouse.postgres.db import embedded
print(embedded.ensure(Path(sys.argv[1])))
"""


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fhir_assets_embedded_") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder) / "home"
        embedded.stop(Path(folder) / "home")


def _server_pid(url: str) -> int:
    with connect(url) as conn:
        row = conn.execute("SELECT pg_backend_pid()").fetchone()
        assert row is not None
        return int(psutil.Process(row[0]).ppid())


def test_processes_that_start_together_share_one_server_and_leave_it_running(home: Path) -> None:
    def print_url(_: int) -> str:
        return subprocess.run(
            [sys.executable, "-c", _PRINT_URL, str(home)], capture_output=True, text=True, check=True
        ).stdout.strip()

    with ThreadPoolExecutor(3) as pool:
        urls = set(pool.map(print_url, range(3)))
    assert urls == {embedded.ensure(home)}
    assert embedded.is_running(home)


def test_both_databases_exist(home: Path) -> None:
    for name in (embedded.DATABASE, embedded.DAGSTER_DATABASE):
        with connect(embedded.ensure(home, name)) as conn:
            assert conn.execute("SELECT current_database()").fetchone() == (name,)


def test_a_read_only_connection_to_an_old_schema_is_an_error_that_names_the_command_to_migrate(home: Path) -> None:
    url = embedded.ensure(home)
    migrations.upgrade(url)
    with connect(url) as conn:
        conn.execute("UPDATE ops.alembic_version SET version_num = '0001'")
    warehouse = Warehouse(load_settings(db_url=None, fhir_assets_home=home))
    with pytest.raises(ConfigurationError, match=r"at revision 0001, .*: run `fhir-assets migrate`"):
        warehouse.connect_read_only()
    assert schema_state.read_revision(url) == "0001"


def test_committed_rows_survive_kill_9(home: Path) -> None:
    url = embedded.ensure(home)
    with connect(url) as conn:
        conn.execute("SET LOCAL synchronous_commit = on")
        conn.execute("CREATE TABLE committed AS SELECT 1 AS x")
    os.kill(_server_pid(url), signal.SIGKILL)
    with connect(embedded.ensure(home)) as conn:
        assert conn.execute("SELECT x FROM committed").fetchone() == (1,)


def test_audit_records_and_what_is_committed_with_them_survive_kill_9(home: Path) -> None:
    warehouse = Warehouse(load_settings(db_url=None, fhir_assets_home=home))
    with warehouse.connect() as conn:
        assert conn.execute("SHOW synchronous_commit").fetchone() == ("off",)
        conn.commit()
        server = _server_pid(warehouse.url())
        conn.execute("CREATE TABLE done AS SELECT 1 AS x")
        audit_log.record(conn, AuditRecord("create", "test", "Patient"))
    os.kill(server, signal.SIGKILL)
    with connect(embedded.ensure(home)) as conn:
        assert conn.execute("SHOW synchronous_commit").fetchone() == ("off",)
        assert conn.execute("SELECT x FROM done").fetchone() == (1,)
        assert conn.execute("SELECT count(*) FROM ops.audit_log WHERE actor = 'test'").fetchone() == (1,)


def test_a_pid_file_with_the_id_of_another_running_program_is_ignored(home: Path) -> None:
    """Process ids are reused after a reboot and in a new container."""
    embedded.ensure(home)
    embedded.stop(home)
    data = home.resolve() / "postgres"
    (data / "postmaster.pid").write_text(f"{os.getpid()}\n{data}\n1\n5432\n{data}\n\n\nready\n")
    with connect(embedded.ensure(home)) as conn:
        assert conn.execute("SELECT 1").fetchone() == (1,)


def test_a_server_with_connections_is_stopped_only_without_only_if_unused(home: Path) -> None:
    with connect(embedded.ensure(home)):
        assert not embedded.stop(home, only_if_unused=True)
        assert embedded.is_running(home)
        assert embedded.stop(home)
    assert not embedded.is_running(home)


def test_a_folder_too_long_for_a_socket_with_blanks_and_quotes_works(home: Path) -> None:
    long_home = home / ("it's a long folder " + "x" * 90)
    try:
        with connect(embedded.ensure(long_home)) as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)
            socket_folder = Path(conn.info.host)
        assert len(str(socket_folder)) < 100
    finally:
        embedded.stop(long_home)
    assert not socket_folder.exists()


def test_an_interrupted_first_start_is_repeated(home: Path) -> None:
    home.mkdir()
    interrupted = home / "postgres-interrupted"
    interrupted.mkdir()
    (interrupted / "PG_VERSION").write_text("18")
    assert embedded.ensure(home)


def test_only_the_owner_reaches_the_socket(home: Path) -> None:
    embedded.ensure(home)
    assert (home / "postgres").stat().st_mode & 0o077 == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change to another user")
def test_the_home_links_to_the_data_folder_if_the_servers_user_cannot_access_the_home(home: Path) -> None:
    home.mkdir(mode=0o700)
    url = embedded.ensure(home)
    assert (home / "postgres").is_symlink()
    assert home.stat().st_mode & 0o077 == 0
    embedded.stop(home)
    assert embedded.ensure(home) == url
    data = (home / "postgres").resolve()
    embedded.stop(home)
    subprocess.run(["rm", "-r", str(data)], check=True)
    assert embedded.ensure(home) != url
    embedded.stop(home)
    subprocess.run(["rm", "-r", str((home / "postgres").resolve())], check=True)


def test_a_home_that_cannot_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigurationError, match="FHIR_ASSETS_HOME"):
        embedded.ensure(file / "home")


def test_a_damaged_data_folder_is_an_error_that_names_the_failed_program(home: Path) -> None:
    embedded.ensure(home)
    embedded.stop(home)
    (home / "postgres" / "global" / "pg_control").unlink()
    with pytest.raises(DatabaseUnavailable, match="pg_ctl failed"):
        embedded.ensure(home)
