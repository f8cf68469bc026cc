"""PgBouncer between the project and Postgres is refused by name, at the start of a command."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from fhir_assets_tests.support.daemon import wait_until

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed")]


@pytest.fixture(params=["", "options"])
def pooled(database: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a database behind PgBouncer in transaction mode, which ignores some startup parameters."""
    target = conninfo_to_dict(database)
    user = str(target.get("user") or "postgres")
    folder = Path(tempfile.mkdtemp(prefix="pgbouncer_"))  # pytest's folders are closed to the account of PgBouncer
    folder.chmod(0o777)
    (folder / "users.txt").write_text(f'"{user}" ""\n')
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\n* = host={target['host']} port={target.get('port') or 5432}\n"
        "[pgbouncer]\npool_mode = transaction\nlisten_addr =\nlisten_port = 6432\nauth_type = trust\n"
        f"auth_file = {folder}/users.txt\nunix_socket_dir = {folder}\n"
        f"ignore_startup_parameters = extra_float_digits,{request.param or 'extra_float_digits'}\n"
    )
    assert PGBOUNCER is not None
    account = pwd.getpwuid(os.stat(str(target["host"])).st_uid).pw_name  # the only one that reaches the socket
    command = [PGBOUNCER, *(["-u", account] if os.geteuid() == 0 else []), str(folder / "pgbouncer.ini")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"postgresql://{user}@/{target['dbname']}?host={folder}&port=6432"

    def is_ready() -> bool:
        try:
            psycopg.connect(url, connect_timeout=3).close()
        except psycopg.OperationalError:
            return False
        return True

    try:
        wait_until(is_ready, seconds=30)
        yield url
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(folder)


@pytest.mark.parametrize("command", [["migrate"], ["runs", "list"]])
def test_a_pooler_is_refused_by_name(pooled: str, tmp_path: Path, command: list[str]) -> None:
    environment = {
        **os.environ,
        "DB_URL": pooled,
        "DAGSTER_POSTGRES_URL": pooled,
        "FHIR_ASSETS_HOME": str(tmp_path / "home"),
    }
    program = [sys.executable, "-c", "from fhir_assets.cli import main; main()", *command]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 78, done.stderr
    assert "A pooler such as PgBouncer answers" in done.stderr
    assert "let DB_URL name Postgres itself" in done.stderr
