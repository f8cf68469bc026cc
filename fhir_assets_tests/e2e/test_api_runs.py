"""Runs that are started over HTTP, with Dagster's webserver and daemon and a FHIR server."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import requests

from fhir_assets.api.dagster import DagsterClient
from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.api import TOKENS, Api, api_in_threads
from fhir_assets_tests.support.api_fuzz import fuzz
from fhir_assets_tests.support.content import instant, patient
from fhir_assets_tests.support.daemon import wait_until
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.deployment_daemon import NEVER, daemon, environment

DAY = datetime(2024, 1, 5, tzinfo=UTC)
TYPES = "Patient,Encounter,Observation"


def observation(identity: str, subject: str, **fields: Any) -> bytes:
    content = {
        "resourceType": "Observation",
        "id": identity,
        "meta": {"versionId": "1", "lastUpdated": instant(DAY)},
        "status": "final",
        "code": {"text": "Heart rate"},
        "subject": {"reference": f"Patient/{subject}"},
    }
    return json.dumps({**content, **fields}).encode()


@contextmanager
def webserver(deployment: Deployment, log: Path, **changed: str) -> Iterator[str]:
    """Run ``dagster-webserver`` during the block and yield its URL."""
    port = find_free_port()
    command = [
        sys.executable,
        "-m",
        "dagster_webserver",
        "--port",
        str(port),
        "--module-name",
        "fhir_assets.definitions",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment(deployment, **changed),
            cwd=deployment.settings.home,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(DagsterClient(url, timeout=5).is_ready, seconds=240)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def ended(api: Api, run_id: str) -> str:
    """Wait until a run has ended and return its status from the API."""
    while (status := api.get(f"/runs/{run_id}").json()["status"]) not in ("SUCCESS", "FAILURE"):
        time.sleep(1)
    return str(status)


@pytest.mark.slow
def test_runs_are_started_awaited_inspected_replayed_and_exported_over_http(deploy: Deploy, tmp_path: Path) -> None:
    # Patient b is outside of the requested windows: only the fetch of missing references loads it.
    bad = observation("o3", "a", status="finale")
    content = [patient("a", DAY), patient("b", datetime(2023, 1, 1, tzinfo=UTC)), bad]
    content += [observation("o1", "a"), observation("o2", "b")]
    (tmp_path / "landing").mkdir()
    with SandboxServer(content) as server:
        deployment = deploy(
            fhir_base_url=server.url,
            fhir_resource_types=TYPES,
            fhir_last_updated_gte=DAY,
            fhir_partition="monthly",
            fhir_export_url=str(tmp_path / "exports"),
            fhir_landing_url=str(tmp_path / "landing"),
            api_tokens=TOKENS,
            api_rate_limit=100_000,
        )
        changed = {"FHIR_SCHEDULE": NEVER, "FHIR_EXPORT_URL": str(tmp_path / "exports")}
        changed["FHIR_LAST_UPDATED_GTE"] = DAY.isoformat()
        with webserver(deployment, tmp_path / "webserver.log", **changed) as url:
            settings = deployment.settings.model_copy(update={"dagster_webserver_url": url})
            with api_in_threads(settings) as api:
                _queued(api)
                with daemon(deployment, tmp_path / "daemon.log", **changed):
                    run_id = _loaded(api)
                    _backfilled(api, deployment)
                    _replayed(api, deployment, run_id)
                    _exported(api, run_id, tmp_path / "exports")
                known = {"run_id": run_id, "patient_id": "a", "resource_type": "observations"}
                seen = fuzz(api, examples=20, known=known)
                # No generated request is a valid resource or names a task.
                refused = {label for label, statuses in seen.items() if not statuses & {200, 202}}
                assert refused <= {"POST /fhir", "GET /ingest/tasks/{task_id}"}
                assert api.get("/health").json()["dagster"] is True
        with api_in_threads(settings) as api:
            _without_dagster(api, run_id)


def _queued(api: Api) -> None:
    """A queued run has a summary."""
    answer = api.post("/ingest/encounters?wait=1", role="operator")
    assert answer.status_code == 202, answer.text
    (run,) = answer.json()["runs"]
    assert run["counts"] is None
    summary = api.get(run["summary"], role="operator").json()
    assert (summary["run_id"], summary["types"]) == (run["run_id"], [])
    assert summary["status"] in ("QUEUED", "STARTING")


def _loaded(api: Api) -> str:
    answer = api.post("/ingest/observations?wait=300", role="operator")
    assert answer.status_code == 202, answer.text
    (run,) = answer.json()["runs"]
    assert run["status"] == "SUCCESS", answer.text
    assert requests.get(run["dagster"], timeout=30).status_code == 200
    (counts,) = run["counts"]
    assert (counts["resource_type"], counts["fetched"], counts["valid"], counts["loaded"]) == ("Observation", 3, 2, 2)
    assert counts["triggered_by"] == "api:operator"
    whole = api.get(f"/runs/{run['run_id'][:8]}").json()
    assert whole["run_id"] == run["run_id"]
    assert whole["types"][0]["dead_letters"] == {"validate": 1}
    (latest,) = api.get("/runs?resource_type=observation&limit=1").json()["runs"]
    assert latest["run_id"] == run["run_id"]
    by_number = api.get(f"/runs/{latest['number']}").json()
    assert (by_number["run_id"], by_number["number"]) == (run["run_id"], latest["number"])
    assert api.post("/ingest/observations").json()["run_id"] is not None, "the open window is asked for again"
    return str(run["run_id"])


def _backfilled(api: Api, deployment: Deployment) -> None:
    started = api.post("/ingest/observations/backfill?wait=300").json()["runs"]
    assert [run["status"] for run in started] == ["SUCCESS"] * len(started)
    assert deployment.count_loaded().get("Patient") == 2
    counts = {row["resource_type"]: row for run in started for row in run["counts"]}
    assert (counts["Patient"]["fetched"], counts["Patient"]["loaded"]) == (2, 2)


def _replayed(api: Api, deployment: Deployment, run_id: str) -> None:
    (dead_letter,) = api.get(f"/runs/{run_id}/deadletters?limit=5", role="operator").json()["dead_letters"]
    assert (dead_letter["resource_type"], dead_letter["resource_id"], dead_letter["status"]) == (
        "Observation",
        "o3",
        "open",
    )
    assert "finale" not in json.dumps(dead_letter)
    assert api.post(f"/runs/{run_id}/replay?stage=load").json()["marked"] == 0
    answer = api.post(f"/runs/{run_id}/replay?stage=validate", role="operator").json()
    assert answer["marked"] == 1
    (replay,) = answer["runs"]
    assert ended(api, replay) == "SUCCESS"
    query = "SELECT status FROM ops.dead_letters WHERE id = %s AND attempts > %s"
    wait_until(lambda: deployment.query(query, dead_letter["id"], dead_letter["attempts"]) == [("open",)], seconds=240)


def _exported(api: Api, run_id: str, exports: Path) -> None:
    answer = api.post(f"/export/observation?run_id={run_id}&include_raw=true", role="operator")
    assert answer.status_code == 200, answer.text
    names = {file["name"].rpartition("/")[2]: file["rows"] for file in answer.json()["files"]}
    assert any(rows == 3 for name, rows in names.items() if "raw" in name), names
    assert any(rows == 2 for name, rows in names.items() if name.endswith(".parquet")), names
    assert list(exports.rglob("*.manifest.json"))


def _without_dagster(api: Api, run_id: str) -> None:
    """Without Dagster the API shows past runs, and starting a run fails."""
    assert api.get(f"/runs/{run_id}").json()["status"] is None
    answer = api.post("/ingest/observations")
    assert (answer.status_code, answer.headers["Content-Type"]) == (503, "application/problem+json")
    assert api.get("/runs/there-is-none").status_code == 503
    health = api.get("/health/ready", role=None)
    assert (health.status_code, health.json()["dagster"], health.json()["database"]) == (503, False, True)
