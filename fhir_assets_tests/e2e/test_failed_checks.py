"""Dagster's daemon loads invalid resources, the check fails and an alert is sent. The source corrects two of the
resources and an operator corrects the other two. After a replay the check passes again.
"""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.alerts import receive_webhooks
from fhir_assets_tests.support.content import add, materialize, patient
from fhir_assets_tests.support.daemon import wait_until
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.deployment_daemon import daemon

pytestmark = pytest.mark.slow

MONTH = datetime(2024, 2, 1, tzinfo=UTC)
MONTH_KEY = "2024-02-01"
SECRET = "Wintergarten"
INVALID_IDS = ("p0", "p50", "p100", "p150")


def fhir_assets(*arguments: str) -> Any:
    """Run a command with ``--json`` and return its parsed output."""
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def last_evaluation_passed(deployment: Deployment, check_name: str, partition: str) -> bool:
    """Return whether the last evaluation of a check of ``normalized/patient`` passed for a window."""
    key = dg.AssetCheckKey(dg.AssetKey(["normalized", "patient"]), check_name)
    records = deployment.instance.event_log_storage.get_asset_check_execution_history(key, limit=1000)
    evaluations = [
        data
        for record in records
        if record.event
        and record.event.dagster_event
        and isinstance(data := record.event.dagster_event.event_specific_data, dg.AssetCheckEvaluation)
        and data.partition == partition
    ]
    return evaluations[0].passed


def test_invalid_resources_are_reported_corrected_and_replayed_until_the_checks_pass(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = [{"family": SECRET}]
    bodies = [
        patient(f"p{n}", MONTH + timedelta(hours=n), name=name, gender=SECRET if f"p{n}" in INVALID_IDS else "male")
        for n in range(200)
    ]
    with SandboxServer(bodies) as server, receive_webhooks() as webhook:
        deployment = deploy(
            fhir_base_url=server.url,
            fhir_resource_types="Patient",
            fhir_last_updated_gte="2024-01-01",
            fhir_partition="monthly",
        )
        settings = {
            "FHIR_SCHEDULE": "* * * * *",
            "ALERT_WEBHOOK_URL": webhook.url,
            "DEAD_LETTER_WARN_RATE": "0.001",
            "DEAD_LETTER_ERROR_RATE": "0.001",
        }
        for variable, value in {**deployment.environment(), **settings}.items():
            monkeypatch.setenv(variable, value)
        with daemon(deployment, tmp_path / "daemon.log", **settings):
            wait_until(lambda: deployment.count_loaded() == {"Patient": 196}, seconds=240)
            wait_until(lambda: len(webhook.messages) == 1, seconds=120)
            assert not last_evaluation_passed(deployment, "dead_letter_rate", MONTH_KEY)
            assert last_evaluation_passed(deployment, "reconciles", MONTH_KEY)
            dead_letters = fhir_assets("dead-letters", "list")
            assert {dead_letter["resource_id"] for dead_letter in dead_letters} == set(INVALID_IDS)
            (load_run_id,) = {dead_letter["run_id"] for dead_letter in dead_letters}
            assert [counts["dead"] for counts in fhir_assets("runs", "show", load_run_id)] == [4]

            now = datetime.now(UTC)
            corrected = [patient(id_, now, version="2", name=name, gender="female") for id_ in INVALID_IDS[:2]]
            add(server, *corrected)
            wait_until(lambda: deployment.count_loaded() == {"Patient": 198}, seconds=240)
            wait_until(lambda: len(fhir_assets("dead-letters", "list")) == 2, seconds=60)

            patch = tmp_path / "patch.json"
            patch.write_text(json.dumps([{"op": "replace", "path": "/gender", "value": "other"}]))
            for dead_letter in fhir_assets("dead-letters", "list"):
                fhir_assets("dead-letters", "edit", str(dead_letter["id"]), "--patch", str(patch))
            assert fhir_assets("dead-letters", "replay", "--run", load_run_id, "--no-wait")["dead_letters"] == 2
            wait_until(lambda: deployment.count_loaded() == {"Patient": 200}, seconds=240)
            wait_until(lambda: len(webhook.messages) == 2, seconds=120)

        assert fhir_assets("dead-letters", "list") == []
        dead_letters = fhir_assets("dead-letters", "list", "--status", "all")
        assert (
            sorted(dead_letter["resolution"] for dead_letter in dead_letters)
            == ["corrected"] * 2 + ["superseded by a newer version"] * 2
        )
        assert last_evaluation_passed(deployment, "dead_letter_rate", MONTH_KEY)
        assert last_evaluation_passed(deployment, "reconciles", MONTH_KEY)
        assert materialize(deployment, windows=[MONTH_KEY]).success
        assert last_evaluation_passed(deployment, "reconciles", MONTH_KEY)
        (replay,) = [run for run in fhir_assets("runs", "list") if run["replay_of_run_id"]]
        assert (replay["replay_of_run_id"], replay["status"], replay["loaded"]) == (load_run_id, "SUCCESS", 2)

        opened, closed = webhook.messages
        assert [incident["name"] for incident in opened["began"]] == ["normalized/patient:dead_letter_rate"]
        assert [incident["name"] for incident in closed["over"]] == ["normalized/patient:dead_letter_rate"]
        assert (opened["over"], closed["began"]) == ([], [])
        assert SECRET not in webhook.text
        assert SECRET not in (tmp_path / "daemon.log").read_text()
