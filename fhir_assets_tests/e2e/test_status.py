"""`fhir-assets status` says what runs, what was loaded last and what is wrong, and ends with 1 if something is."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.ops import incidents
from fhir_assets_tests.support.consent_resources import DAY, resource
from fhir_assets_tests.support.deployment import Deploy, Deployment


def ask(deployment: Deployment, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, str, str]:
    for name, value in deployment.environment().items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["status", *options], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def beat(deployment: Deployment, at: datetime) -> None:
    """Record a heartbeat of Dagster's daemon."""
    with Warehouse(deployment.settings).connect() as conn:
        conn.execute("DELETE FROM daemon_heartbeats")
        conn.execute(
            "INSERT INTO daemon_heartbeats (daemon_type, daemon_id, timestamp, body) VALUES ('SENSOR', 'd', %s, '{}')",
            [at.replace(tzinfo=None)],
        )


@pytest.fixture
def deployment(deploy: Deploy) -> Deployment:
    with SandboxServer([json.dumps(json.loads(resource("Patient", "p", DAY))).encode()]) as server:
        deployment = deploy(
            fhir_base_url=server.url,
            fhir_resource_types="Patient",
            fhir_last_updated_gte="2024-01-01",
            fhir_partition="monthly",
        )
        assert all(outcome.success for outcome in deployment.ingest())
    return deployment


def test_a_deployment_without_a_daemon_is_not_well(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, problems = ask(deployment, monkeypatch)
    assert (code, problems.count("No Dagster daemon has ever run")) == (1, 1)
    beat(deployment, datetime.now(UTC) - timedelta(minutes=20))
    code, _, problems = ask(deployment, monkeypatch)
    assert (code, problems.count("The Dagster daemon does not run")) == (1, 1)


def test_a_well_deployment_has_its_last_load_and_no_problem(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat(deployment, datetime.now(UTC))
    code, text, problems = ask(deployment, monkeypatch)
    assert (code, problems) == (0, "")
    assert "Open incidents: 0" in text
    code, text, _ = ask(deployment, monkeypatch, "--json")
    state: dict[str, Any] = json.loads(text)
    (load,) = state["loads"]
    assert (load["type"], load["status"], load["behind"]) == ("Patient", "SUCCESS", 1)
    assert state["problems"] == []
    assert state["disks"][0]["free"] > 0


def test_an_open_incident_and_a_failed_tick_are_problems(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat(deployment, datetime.now(UTC))
    with Warehouse(deployment.settings).connect() as conn:
        incidents.record_failure(conn, "run", "incremental_load", ["2024-01"], counts={})
        body = json.dumps({"__class__": "JobTickData", "job_name": "load_landing"})
        conn.execute(
            "INSERT INTO job_ticks (job_origin_id, selector_id, status, type, timestamp, tick_body)"
            " VALUES ('o', 's', 'FAILURE', 'SENSOR', %s, %s)",
            [datetime.now(UTC).replace(tzinfo=None), body],
        )
    code, _, problems = ask(deployment, monkeypatch)
    assert code == 1
    assert "run incremental_load fails" in problems
    assert "The last tick failed: load_landing" in problems
