"""Patients with invalid genders, and the commands that correct and replay their dead letters."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.ops import dead_letters
from fhir_assets.warehouse.ops.dead_letters import Selection, StoredDeadLetter
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import materialize, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment

DAY = datetime(2024, 1, 5, tzinfo=UTC)
KEY = "2024-01-05"
CORRECTION = [{"op": "replace", "path": "/gender", "value": "female"}]


@contextmanager
def serve_invalid_genders() -> Iterator[SandboxServer]:
    """Serve ten patients on each of two days; three of each day have an invalid gender."""
    bodies = [
        patient(f"p{day}-{n}", DAY + timedelta(days=day, hours=n), gender="wrong" if n < 3 else "male")
        for day in range(2)
        for n in range(10)
    ]
    with SandboxServer(bodies) as server:
        yield server


def load_invalid_genders(deploy: Deploy, server: SandboxServer, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    """Load the patients of the server, and set the environment for the command line."""
    deployment = deploy(fhir_base_url=server.url, fhir_resource_types="Patient", fhir_last_updated_gte="2024-01-01")
    for name, value in deployment.environment().items():
        monkeypatch.setenv(name, value)
    (outcome,) = deployment.ingest(first=DAY, last=DAY + timedelta(days=1))
    assert outcome.success
    return deployment


def run_dead_letters(*arguments: str) -> Any:
    """Run ``fhir-assets dead-letters … --json`` and return its output."""
    result = CliRunner().invoke(app, ["dead-letters", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def find_dead_letters(deployment: Deployment, **chosen: Any) -> list[StoredDeadLetter]:
    """Return the dead letters of a selection."""
    with connect(deployment.url) as conn:
        return dead_letters.find(conn, Selection(**chosen))


def find_dead_letter(deployment: Deployment, patient_id: str) -> StoredDeadLetter:
    """Return the dead letter of a patient."""
    (dead_letter,) = [entry for entry in find_dead_letters(deployment) if entry.resource_id == patient_id]
    return dead_letter


def edit(tmp_path: Path, dead_letter: StoredDeadLetter, patch: object = CORRECTION) -> None:
    """Correct the resource of a dead letter with a JSON Patch."""
    path = tmp_path / "patch.json"
    path.write_text(json.dumps(patch))
    run_dead_letters("edit", str(dead_letter.id), "--patch", str(path), "--by", "anna")


def reconcile(deployment: Deployment, *windows: str) -> bool:
    """Materialize the windows again. Return True if the run and all of its checks passed."""
    result = materialize(deployment, windows=list(windows))
    return result.success and all(evaluation.passed for evaluation in deployment.checks(result.run_id))


def count_genders(deployment: Deployment) -> dict[str, int]:
    """Return the number of loaded patients by gender."""
    return dict(deployment.query("SELECT gender, count(*) FROM fhir.patient GROUP BY 1"))
