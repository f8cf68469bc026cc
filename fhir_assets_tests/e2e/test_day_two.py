"""Dagster's daemon loads invalid resources: the check fails and an alert is sent. Half of them are corrected at the
source and half by an operator; they are replayed, and the check passes again.
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
from fhir_assets_tests.support.daemon import until
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.deployment_daemon import daemon

pytestmark = pytest.mark.slow

MONTH = datetime(2024, 2, 1, tzinfo=UTC)
KEY = "2024-02-01"
SECRET = "Wintergarten"
BAD = ("p0", "p50", "p100", "p150")


def fhir_assets(*arguments: str) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def latest(deployment: Deployment, name: str, partition: str) -> bool:
    """Return whether the last evaluation of a check of Patient's table passed for a window."""
    key = dg.AssetCheckKey(dg.AssetKey(["normalized", "patient"]), name)
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
        patient(f"p{n}", MONTH + timedelta(hours=n), name=name, gender=SECRET if f"p{n}" in BAD else "male")
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
            until(lambda: deployment.loaded() == {"Patient": 196}, seconds=240)
            until(lambda: len(webhook.messages) == 1, seconds=120)
            assert not latest(deployment, "dead_letter_rate", KEY)
            assert latest(deployment, "reconciles", KEY)
            letters = fhir_assets("dead-letters", "list")
            assert {each["resource_id"] for each in letters} == set(BAD)
            (load,) = {each["run_id"] for each in letters}
            assert [each["dead"] for each in fhir_assets("runs", "show", load)] == [4]

            now = datetime.now(UTC)
            add(server, *(patient(each, now, version="2", name=name, gender="female") for each in BAD[:2]))
            until(lambda: deployment.loaded() == {"Patient": 198}, seconds=240)
            until(lambda: len(fhir_assets("dead-letters", "list")) == 2, seconds=60)

            patch = tmp_path / "patch.json"
            patch.write_text(json.dumps([{"op": "replace", "path": "/gender", "value": "other"}]))
            for each in fhir_assets("dead-letters", "list"):
                fhir_assets("dead-letters", "edit", str(each["id"]), "--patch", str(patch))
            assert fhir_assets("dead-letters", "replay", "--run", load, "--no-wait")["dead_letters"] == 2
            until(lambda: deployment.loaded() == {"Patient": 200}, seconds=240)
            until(lambda: len(webhook.messages) == 2, seconds=120)

        assert fhir_assets("dead-letters", "list") == []
        resolutions = [each["resolution"] for each in fhir_assets("dead-letters", "list", "--status", "all")]
        assert sorted(resolutions) == ["corrected"] * 2 + ["superseded by a newer version"] * 2
        assert latest(deployment, "dead_letter_rate", KEY)
        assert latest(deployment, "reconciles", KEY)
        assert materialize(deployment, windows=[KEY]).success
        assert latest(deployment, "reconciles", KEY)
        (replay,) = [run for run in fhir_assets("runs", "list") if run["replay_of_run_id"]]
        assert (replay["replay_of_run_id"], replay["status"], replay["loaded"]) == (load, "SUCCESS", 2)

        alert, all_clear = webhook.messages
        assert [each["name"] for each in alert["began"]] == ["normalized/patient:dead_letter_rate"]
        assert [each["name"] for each in all_clear["over"]] == ["normalized/patient:dead_letter_rate"]
        assert (alert["over"], all_clear["began"]) == ([], [])
        assert SECRET not in webhook.text
        assert SECRET not in (tmp_path / "daemon.log").read_text()
