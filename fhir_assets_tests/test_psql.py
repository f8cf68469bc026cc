"""`fhir-assets psql`: Postgres' terminal on the deployment's database."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from fhir_assets.cli import psql

COMMAND = [sys.executable, "-c", "from fhir_assets.cli.main import main; main()", "psql"]


def run(home: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    variables = {name: value for name, value in os.environ.items() if name != "DB_URL"}
    return subprocess.run(
        [*COMMAND, "--", *arguments],
        env={**variables, "FHIR_ASSETS_HOME": str(home), **environment},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_opens_the_database_of_db_url_with_the_arguments_of_psql(tmp_path: Path, database: str) -> None:
    done = run(tmp_path, "-At", "-c", "SELECT 40 + 2", DB_URL=database)
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    assert run(tmp_path, "-c", "SELECT nothing", DB_URL=database).returncode == 1


def test_it_opens_the_embedded_database_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    done = run(tmp_path, "-At", "-c", "SELECT current_database()")
    assert (done.returncode, done.stdout) == (0, "fhir_assets\n"), done.stderr
    assert not list((tmp_path / "postgres").rglob("postmaster.pid")), "it was not running before"


def test_psql_receives_all_parameters_of_the_url_and_no_argument_has_the_password(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "psql"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$PGPASSWORD" "$PGHOST" "$@"\n')
    program.chmod(0o755)
    url = (
        "postgresql://nurse:se%20cret@db.example/fhir?sslmode=verify-full&sslcert=c.pem&hostaddr=10.0.0.1&keepalives=0"
    )
    assert psql._run(str(program), f"{url}&options=-c%20search_path%3Dmarts", ["-c", "SELECT 1"]) == 0
    password, host, dbname, *rest = capfd.readouterr().out.splitlines()
    assert (password, host, rest) == ("se cret", "db.example", ["-c", "SELECT 1"])
    assert conninfo_to_dict(dbname.removeprefix("--dbname=")) == {
        "user": "nurse",
        "host": "db.example",
        "dbname": "fhir",
        "sslmode": "verify-full",
        "sslcert": "c.pem",
        "hostaddr": "10.0.0.1",
        "keepalives": "0",
        "options": "-c search_path=marts",
    }
