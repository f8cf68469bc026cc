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

from fhir_assets.errors import ConfigurationError, DatabaseUnavailable
from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets.warehouse.postgres.db.connections import connect

_JOIN = """
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
    def join(_: int) -> str:
        return subprocess.run(
            [sys.executable, "-c", _JOIN, str(home)], capture_output=True, text=True, check=True
        ).stdout.strip()

    with ThreadPoolExecutor(3) as pool:
        urls = set(pool.map(join, range(3)))
    assert urls == {embedded.ensure(home)}
    assert embedded.is_running(home)


def test_both_databases_exist(home: Path) -> None:
    for name in (embedded.DATABASE, embedded.DAGSTER_DATABASE):
        with connect(embedded.ensure(home, name)) as conn:
            assert conn.execute("SELECT current_database()").fetchone() == (name,)


def test_committed_rows_survive_kill_9(home: Path) -> None:
    url = embedded.ensure(home)
    with connect(url) as conn:
        conn.execute("SET LOCAL synchronous_commit = on")
        conn.execute("CREATE TABLE kept AS SELECT 1 AS x")
    os.kill(_server_pid(url), signal.SIGKILL)
    with connect(embedded.ensure(home)) as conn:
        assert conn.execute("SELECT x FROM kept").fetchone() == (1,)


def test_a_pid_file_that_names_another_living_program_does_not_matter(home: Path) -> None:
    """As after a reboot, or in a new container, where numbers are used again."""
    embedded.ensure(home)
    embedded.stop(home)
    data = home.resolve() / "postgres"
    (data / "postmaster.pid").write_text(f"{os.getpid()}\n{data}\n1\n5432\n{data}\n\n\nready\n")
    with connect(embedded.ensure(home)) as conn:
        assert conn.execute("SELECT 1").fetchone() == (1,)


def test_a_server_in_use_is_not_stopped_unless_asked_to(home: Path) -> None:
    with connect(embedded.ensure(home)):
        assert not embedded.stop(home, only_if_unused=True)
        assert embedded.is_running(home)
        assert embedded.stop(home)
    assert not embedded.is_running(home)


def test_a_folder_too_long_for_a_socket_with_blanks_and_quotes_works(home: Path) -> None:
    long = home / ("it's a long folder " + "x" * 90)
    try:
        with connect(embedded.ensure(long)) as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)
            sockets = Path(conn.info.host)
        assert len(str(sockets)) < 100
    finally:
        embedded.stop(long)
    assert not sockets.exists()


def test_an_interrupted_first_start_is_repeated(home: Path) -> None:
    home.mkdir()
    half = home / "postgres-broken"
    half.mkdir()
    (half / "PG_VERSION").write_text("18")
    assert embedded.ensure(home)


def test_only_the_owner_reaches_the_socket(home: Path) -> None:
    embedded.ensure(home)
    assert (home / "postgres").stat().st_mode & 0o077 == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_the_data_folder_is_elsewhere_if_the_servers_user_cannot_reach_the_home(home: Path) -> None:
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


def test_a_damaged_data_folder_is_a_clear_error(home: Path) -> None:
    embedded.ensure(home)
    embedded.stop(home)
    (home / "postgres" / "global" / "pg_control").unlink()
    with pytest.raises(DatabaseUnavailable, match="pg_ctl failed"):
        embedded.ensure(home)
