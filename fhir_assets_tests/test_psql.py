"""`fhir-assets psql`: Postgres' terminal on the deployment's database."""

import os
import subprocess
import sys
from pathlib import Path

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
