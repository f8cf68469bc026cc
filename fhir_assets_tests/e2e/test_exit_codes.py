"""Real processes of the command line end with the exit code and the sentence of what stopped them."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from psycopg import sql

from fhir_assets.warehouse.postgres.db import advisory_locks, schema_state
from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url, with_database
from fhir_assets_tests.support.daemon import wait_until

pytestmark = pytest.mark.slow


def start(url: str, home: Path, *command: str) -> subprocess.Popen[str]:
    """Start a command on a database."""
    environment = {
        **os.environ,
        "DB_URL": url,
        "DAGSTER_POSTGRES_URL": normalise_url(url, "psycopg2"),
        "FHIR_ASSETS_HOME": str(home),
    }
    program = [sys.executable, "-c", "from fhir_assets.cli import main; main()", *command]
    return subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a command. Return its exit code and stderr, which has no stack trace and calls nothing a defect."""
    _, shown = process.communicate(timeout=120)
    assert "Traceback" not in shown
    assert "defect" not in shown
    return process.returncode, shown


def test_four_upgrades_at_once_succeed(empty_database: str, tmp_path: Path) -> None:
    processes = [start(empty_database, tmp_path, "migrate") for _ in range(4)]
    assert [finish(process) for process in processes] == [(0, "")] * 4
    assert schema_state.is_current(empty_database)


def test_an_upgrade_of_a_read_only_database_names_the_primary(empty_database: str, tmp_path: Path) -> None:
    name = urlsplit(empty_database).path.lstrip("/")
    with connect(with_database(empty_database, "postgres"), autocommit=True) as conn:
        conn.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(sql.Identifier(name)))
    code, shown = finish(start(empty_database, tmp_path, "migrate"))
    assert (code, "Let DB_URL name the primary" in shown) == (78, True), shown


def test_ctrl_c_in_a_wait_for_a_lock_is_an_interruption(empty_database: str, tmp_path: Path) -> None:
    waits = "SELECT count(*) > 0 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with connect(empty_database, autocommit=True) as conn:
        conn.execute("SELECT pg_advisory_lock(%s)", [advisory_locks.SCHEMA])
        process = start(empty_database, tmp_path, "migrate")
        wait_until(lambda: conn.execute(waits).fetchone() == (True,), seconds=60)
        process.send_signal(signal.SIGINT)
        assert finish(process)[0] == 130


def test_a_postgres_that_ends_the_connections_is_tried_again_later(empty_database: str, tmp_path: Path) -> None:
    waits = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with connect(empty_database, autocommit=True) as conn:
        conn.execute("SELECT pg_advisory_lock(%s)", [advisory_locks.SCHEMA])
        process = start(empty_database, tmp_path, "migrate")
        wait_until(lambda: conn.execute(waits).fetchone() is not None, seconds=60)
        conn.execute(f"SELECT pg_terminate_backend(pid) FROM ({waits}) waiting".encode())
        code, shown = finish(process)
    assert (code, "try again" in shown) == (75, True), shown
