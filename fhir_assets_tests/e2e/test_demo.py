"""`fhir-assets demo` as a process, once and again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url


def run_demo(home: Path, database: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
    return subprocess.run(
        [sys.executable, "-c", "from fhir_assets.cli import main; main()", "demo", "--no-ui", "--patients", "1"],
        env={
            **environment,
            "FHIR_ASSETS_HOME": str(home),
            "DB_URL": database,
            "DAGSTER_POSTGRES_URL": normalise_url(database, "psycopg2"),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_second_demo_continues_with_the_first_although_its_server_has_another_port(
    tmp_path: Path, database: str
) -> None:
    first = run_demo(tmp_path, database)
    assert first.returncode == 0, first.stderr
    assert "Loaded now" in first.stdout
    with connect(database) as conn:
        checks = conn.execute(
            "SELECT DISTINCT check_name FROM asset_check_executions WHERE execution_status IN ('SUCCEEDED', 'FAILED')"
        ).fetchall()
    assert {name for (name,) in checks} >= {"reconciles", "dead_letter_rate", "fresh", "no_duplicates", "volume"}
    second = run_demo(tmp_path, database)
    assert second.returncode == 0, second.stderr
    assert "Loaded earlier" in second.stdout


@pytest.mark.slow
def test_a_demo_does_not_mix_its_patients_with_those_of_another_server(tmp_path: Path, database: str) -> None:
    assert run_demo(tmp_path, database).returncode == 0
    with connect(database) as conn:
        conn.execute(
            """
            UPDATE ops.sources
            SET settings = settings || '{"FHIR_BASE_URL": "https://hospital.example/fhir"}'
            """
        )
    refused = run_demo(tmp_path, database)
    assert refused.returncode == 78
    assert "FHIR_BASE_URL was https://hospital.example/fhir" in refused.stderr
