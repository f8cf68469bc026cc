"""Dagster's own commands in a checkout, with nothing set but a folder for the embedded Postgres."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fhir_assets.orchestration.instance.config import open_instance
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db import embedded

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    embedded.stop(tmp_path)


def run(home: Path, program: str, *arguments: str) -> str:
    """Run a command in the checkout and return its output."""
    unset = ("DAGSTER_HOME", "DAGSTER_POSTGRES_URL", "DB_URL", "FHIR_BASE_URL")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    result = subprocess.run(
        [str(Path(sys.executable).with_name(program)), *arguments],
        env={**environment, "FHIR_ASSETS_HOME": str(home), "DAGSTER_HOME": "", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("dagster definitions validate", "Validation successful for code location fhir_assets."),
        ("dagster asset list -m fhir_assets.definitions", "normalized/patient"),
        ("dg list defs", "normalized/patient"),
        ("dg check defs", "All definitions loaded successfully."),
    ],
)
def test_a_command_knows_the_project(home: Path, command: str, expected: str) -> None:
    assert expected in run(home, *command.split())


def test_a_materialization_by_dagster_is_a_run_of_the_instance_of_fhir_assets(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(
        home,
        "dagster",
        "asset",
        "materialize",
        "-m",
        "fhir_assets.definitions",
        "--select",
        "normalized/device",
        "--partition",
        "2026-01-01",
    )
    for name in ("DAGSTER_HOME", "DAGSTER_POSTGRES_URL", "DB_URL"):
        monkeypatch.delenv(name, raising=False)
    with open_instance(load_settings(fhir_assets_home=home)) as instance:
        assert len(instance.get_runs()) == 1
