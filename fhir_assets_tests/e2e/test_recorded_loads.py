"""`fhir-assets ingest` executes the steps without Dagster: its recorder gives the run that Dagster would have given."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fhir_assets.ingestion import dagster_state
from fhir_assets.orchestration.tags import FHIR_SERVER_POOL
from fhir_assets.sandbox.faults import Fault, FaultKind, RequestKind
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import encounter, patient
from fhir_assets_tests.support.daemon import wait_until
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.killed_runs import Page, command, wait_for_step
from fhir_assets_tests.support.small_population import START

LOAD = ("ingest", "--from", "2024-01-01", "--to", "2024-01-02")
TYPES = "Patient,Encounter"
BODIES = [
    patient("a", START),
    patient("b", START, gender="no gender"),
    encounter("c", START, "Patient/a"),
    encounter("d", START, "Patient/unknown"),
]
_TIMES = ("seconds", "per_second", "path", "storage_id", "timestamp", "run_id")

SEEN = """
    SELECT dagster_event_type, step_key, asset_key, partition, event
    FROM event_logs
    WHERE dagster_event_type IN (
        'ASSET_MATERIALIZATION', 'ASSET_MATERIALIZATION_PLANNED', 'ASSET_CHECK_EVALUATION', 'STEP_START',
        'STEP_FAILURE', 'STEP_SUCCESS', 'STEP_SKIPPED', 'PIPELINE_SUCCESS', 'PIPELINE_FAILURE'
    )
"""


def run(deployment: Deployment, *arguments: str) -> tuple[int, str]:
    """Run a command; return its exit code and output."""
    with command(deployment, *arguments) as process:
        output, _ = process.communicate(timeout=120)
    return process.returncode, output


def list_events(deployment: Deployment) -> list[tuple[Any, ...]]:
    """Return the events of the only run with their metadata, without times, ids and names of files."""
    events = []
    for kind, step, asset, partition, event in deployment.query(SEEN):
        data = json.loads(event)["dagster_event"]["event_specific_data"] or {}
        of_asset = data.get("materialization") or data
        metadata = of_asset.get("metadata_entries") or []
        shown = sorted(
            (entry["label"], json.dumps(entry["entry_data"], sort_keys=True))
            for entry in metadata
            if not any(part in entry["label"] for part in _TIMES)
        )
        told = (data.get("user_failure_data") or {}).get("description", "")
        passed = str(data.get("success", data.get("passed", "")))
        events.append((kind, step or "", asset or "", partition or "", str(shown), told, passed))
    return sorted(events)


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    with SandboxServer(BODIES) as sandbox:
        yield sandbox


@pytest.mark.parametrize("types", [TYPES, "Patient,Encounter,Practitioner"])
def test_the_recorded_run_has_the_events_of_a_run_in_one_process(
    deploy: Deploy, server: SandboxServer, empty_database: str, types: str
) -> None:
    settings = {"fhir_base_url": server.url, "fhir_resource_types": types, "fhir_last_updated_gte": "2024-01-01"}
    recorded = deploy(home="recorded", **settings)
    code, output = run(recorded, *LOAD)
    single = deploy(home="single", url=empty_database, **settings)
    with command(single, *LOAD, begin="import dagster") as process:
        expected, _ = process.communicate(timeout=120)
    assert (code, process.returncode) == (0, 0), output + expected
    events = list_events(recorded)
    assert events == list_events(single)
    assert {"ASSET_MATERIALIZATION", "ASSET_CHECK_EVALUATION", "STEP_SUCCESS"} <= {event[0] for event in events}
    assert recorded.tables() == single.tables()
    assert recorded.count_dead_letters() == single.count_dead_letters() == {"required-binding": 1}


def test_a_step_that_fails_is_recorded_as_in_one_process(
    deploy: Deploy, server: SandboxServer, empty_database: str
) -> None:
    settings = {"fhir_base_url": server.url, "fhir_resource_types": TYPES, "fhir_last_updated_gte": "2024-01-01"}
    recorded = deploy(home="recorded", **settings)
    single = deploy(home="single", url=empty_database, **settings)
    codes = []
    for deployment, begin in ((recorded, ""), (single, "import dagster")):
        with connect(deployment.url) as conn:
            conn.execute("CREATE TABLE fhir.patient (id integer)")
        with command(deployment, *LOAD, begin=begin) as process:
            process.communicate(timeout=120)
        codes.append(process.returncode)
    assert codes[0] == codes[1] != 0
    events = list_events(recorded)
    assert events == list_events(single)
    assert [event[1] for event in events if event[0] == "STEP_FAILURE"] == ["normalized__patient"]


@pytest.fixture
def slow(deploy: Deploy) -> Iterator[Deployment]:
    """A deployment whose FHIR server is slow."""
    with SandboxServer(BODIES, faults=(Fault(kind=FaultKind.SLOW, seconds=4),)) as sandbox:
        yield deploy(fhir_base_url=sandbox.url, fhir_resource_types=TYPES, fhir_last_updated_gte="2024-01-01")


def find_recorder(process: subprocess.Popen[str]) -> psutil.Process:
    (recorder,) = psutil.Process(process.pid).children()
    return recorder


@pytest.mark.slow
def test_a_recorder_that_is_killed_fails_the_command_and_the_run_and_the_next_load_completes_it(
    slow: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with command(slow, *LOAD) as process:
        run_id = wait_for_step(slow, process)
        find_recorder(process).kill()
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "the process that records the load in Dagster was killed by signal 9 (SIGKILL)" in output
    page = Page(slow, run_id, monkeypatch)
    assert page.status == "FAILURE"
    assert page.run_reasons[0] in output
    code, output = run(slow, "ingest", "--to", "2024-01-02")
    assert (code, slow.count_dead_letters()) == (0, {"required-binding": 1}), output
    assert slow.query("SELECT count(*) FROM ops.window_verdicts WHERE NOT reconciled") == [(0,)]


@pytest.mark.slow
def test_a_run_whose_command_is_killed_is_ended_by_its_recorder(
    slow: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with command(slow, *LOAD) as process:
        run_id = wait_for_step(slow, process)
        recorder = find_recorder(process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: not recorder.is_running() or recorder.status() == psutil.STATUS_ZOMBIE, seconds=60)
    page = Page(slow, run_id, monkeypatch)
    assert page.status == "FAILURE"
    assert f"process {process.pid} on " in page.run_reasons[0]
    assert slow.query("SELECT count(*) FROM ops.ingestion_runs WHERE status = 'RUNNING'") == [(0,)]


@pytest.mark.slow
def test_ctrl_c_reaches_the_command_and_ends_the_run_in_dagster(
    slow: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with command(slow, *LOAD, begin="import os; os.setsid()") as process:
        run_id = wait_for_step(slow, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    page = Page(slow, run_id, monkeypatch)
    assert page.status == "FAILURE"
    assert "(SIGINT, Ctrl-C)" in next(iter(page.step_reasons.values()))


def test_no_recorder_is_left_behind(deploy: Deploy, tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "Patient.ndjson").write_bytes(patient("a", START))
    deployment = deploy(
        fhir_base_url=str(tmp_path / "input"),
        fhir_source="ndjson",
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-01",
    )
    for shown in ("Loaded", "nothing to do"):
        code, output = run(deployment, "ingest")
        assert (code, shown in output) == (0, True), output
        home = str(deployment.settings.home)
        environments = [process.info["environ"] or {} for process in psutil.process_iter(["environ"])]
        assert [environment for environment in environments if environment.get("FHIR_ASSETS_HOME") == home] == []


@pytest.mark.parametrize("begin", ["", "import dagster"])
def test_every_range_is_tried_when_the_source_fails(deploy: Deploy, begin: str) -> None:
    """The first type of the settings is not the first that is fetched, so that Dagster skips before it has read all."""
    refused = Fault(kind=FaultKind.ERROR, on=frozenset({RequestKind.KICK_OFF}), status=403)
    with SandboxServer(BODIES, faults=(refused,)) as sandbox:
        deployment = deploy(
            fhir_base_url=sandbox.url,
            fhir_source="bulk",
            fhir_resource_types="Organization,Patient,Encounter",
            fhir_last_updated_gte="2024-01-01",
        )
        with command(deployment, *LOAD, begin=begin, FHIR_WINDOWS_PER_RUN="1") as process:
            output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert output.count("failed") == 2, output
    assert "defect" not in output
    assert deployment.query("SELECT status, count(*) FROM runs GROUP BY status") == [("FAILURE", 2)]


BROKEN_OUTPUT = """
import sys
from fhir_assets.ingestion import recorder
original = recorder.serve
def serve(messages, answers):
    from fhir_assets.orchestration.io_managers.ndjson import NdjsonIOManager
    def fail(self, context, obj):
        raise OSError(28, "No space left on device")
    NdjsonIOManager.handle_output = fail
    original(messages, answers)
from fhir_assets.ingestion import recorder_process
recorder_process.serve = serve
"""


def test_a_result_that_cannot_be_recorded_in_dagster_fails_the_windows(deploy: Deploy, server: SandboxServer) -> None:
    deployment = deploy(fhir_base_url=server.url, fhir_resource_types=TYPES, fhir_last_updated_gte="2024-01-01")
    with command(deployment, *LOAD, begin=BROKEN_OUTPUT) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode != 0, output
    assert "could not be stored" in output
    code, output = run(deployment, *LOAD)
    assert (code, deployment.count_dead_letters()) == (0, {"required-binding": 1}), output


def test_a_limit_of_the_pool_of_the_server_is_kept(deploy: Deploy, server: SandboxServer) -> None:
    deployment = deploy(fhir_base_url=server.url, fhir_resource_types=TYPES, fhir_last_updated_gte="2024-01-01")
    assert not dagster_state.limits_fetches(deployment.settings)
    deployment.instance.event_log_storage.set_concurrency_slots(FHIR_SERVER_POOL, 1)
    assert dagster_state.limits_fetches(deployment.settings)
