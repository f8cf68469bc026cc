"""With FHIR_EXPORT_URL, each run that loads something writes its folder, no matter what started the run."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.ingestion.outcome import Outcome
from fhir_assets.orchestration.jobs import INCREMENTAL_LOAD
from fhir_assets.orchestration.received_windows import select_all_layers
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets_tests.support.api import TOKENS, api_in_threads
from fhir_assets_tests.support.content import add, materialize, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.landing import LandingZone, land
from fhir_assets_tests.support.posts import build_loads, post_patient

DAY = datetime(2024, 1, 5, tzinfo=UTC)
WINDOW = {"first": DAY, "last": DAY + timedelta(hours=23)}
BAD = {"gender": "neither"}


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    with SandboxServer([]) as server:
        add(server, patient("a", DAY), patient("b", DAY, **BAD))
        yield server


@pytest.fixture
def deployment(deploy: Deploy, server: SandboxServer, tmp_path: Path) -> Deployment:
    (tmp_path / "landing").mkdir()
    return deploy(
        fhir_base_url=server.url,
        fhir_landing_url=str(tmp_path / "landing"),
        fhir_export_url=str(tmp_path / "out"),
        fhir_resource_types="Patient",
        fhir_last_updated_gte=DAY,
        api_tokens=TOKENS,
    )


def list_folders(deployment: Deployment) -> list[Path]:
    """Return the folders of runs, the newest last."""
    root = Path(deployment.settings.fhir_export_url, "exports")
    return sorted(root.iterdir(), key=lambda path: path.stat().st_mtime_ns) if root.exists() else []


def find_folder(deployment: Deployment, run_id: str) -> Path:
    (folder,) = [path for path in list_folders(deployment) if path.name.startswith(f"run_{run_id}_")]
    return folder


def list_ids(file: Path) -> list[str]:
    return sorted(json.loads(line)["id"] for line in file.read_text().splitlines())


def list_waiting(deployment: Deployment) -> list[tuple[object, ...]]:
    return deployment.query("SELECT resource_type, partition_key FROM ops.held_windows ORDER BY 1, 2")


def ingest(deployment: Deployment, refresh: Refresh = Refresh.WINDOW) -> Outcome:
    (outcome,) = deployment.ingest(**WINDOW, refresh=refresh)
    return outcome


def test_a_run_that_loads_something_writes_what_it_received_its_dead_letters_and_its_tables(
    deployment: Deployment, server: SandboxServer
) -> None:
    first = ingest(deployment)
    assert first.success
    folder = find_folder(deployment, first.run_id)
    assert list_ids(folder / "Patient.raw.ndjson") == ["a", "b"]
    assert list_ids(folder / "Patient.valid.ndjson") == ["a"]
    (dead_letter,) = map(json.loads, (folder / "Patient.deadletters.ndjson").read_text().splitlines())
    assert (dead_letter["rule"], dead_letter["resource"]["id"]) == ("required-binding", "b")
    names = {file["name"] for file in json.loads((folder / "Patient.manifest.json").read_text())["files"]}
    assert {"Patient.raw.ndjson", "Patient.valid.ndjson", "Patient.deadletters.ndjson", "patient.parquet"} <= names
    assert list_waiting(deployment) == []
    assert ingest(deployment, Refresh.MISSING).success
    assert list_folders(deployment) == [folder], "a run without anything new writes no folder"
    record = deployment.instance.get_latest_materialization_event(dg.AssetKey(["exports", "patient"]))
    assert record
    assert record.run_id != first.run_id, "otherwise an incident of a killed run would stay open"
    add(server, patient("c", DAY + timedelta(hours=1)))
    second = find_folder(deployment, ingest(deployment).run_id)
    assert list_ids(second / "Patient.valid.ndjson") == ["a", "c"]


@pytest.mark.slow
def test_landed_files_and_corrected_dead_letters_get_folders(deployment: Deployment) -> None:
    LandingZone(deployment.settings.fhir_landing_url).put("p.ndjson", patient("landed", DAY) + b"\n{broken\n")
    assert land(deployment) == []
    (folder,) = list_folders(deployment)
    assert list_ids(folder / "Patient.valid.ndjson") == ["landed"]
    ingest(deployment)
    # A dead letter of the load has valid JSON, and its replay loads the bytes that are stored with it.
    deployment.query(
        "UPDATE ops.dead_letters SET stage = 'load' WHERE stage = 'validate' AND resource_id = 'b' RETURNING 1"
    )
    (replay,) = deployment.ingestion().replay(Selection(stage="load"), triggered_by="test")
    assert replay.success
    assert list_ids(find_folder(deployment, replay.run_id) / "Patient.valid.ndjson") == ["a", "b", "landed"]


def test_a_failed_export_fails_its_run_and_the_next_run_includes_the_window(
    deployment: Deployment, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("not a folder")
    failed = ingest(deployment)
    assert not failed.success
    errors = deployment.query(
        "SELECT DISTINCT error FROM ops.ingestion_runs WHERE run_id = %s AND status = 'FAILED'", failed.run_id
    )
    assert any(str(tmp_path / "out") in str(error) for (error,) in errors), errors
    assert deployment.count_loaded() == {"Patient": 1}
    assert list_waiting(deployment) == [("Patient", "2024-01-05")]
    (tmp_path / "out").unlink()
    again = ingest(deployment, Refresh.MISSING)
    assert again.success
    assert list_ids(find_folder(deployment, again.run_id) / "Patient.valid.ndjson") == ["a"]
    assert list_waiting(deployment) == []


@pytest.mark.slow
def test_a_window_with_dead_letters_only_is_in_the_folder_of_the_next_run_if_its_export_fails(
    deployment: Deployment, server: SandboxServer, tmp_path: Path
) -> None:
    add(server, patient("a", DAY, **BAD))
    (tmp_path / "out").write_text("not a folder")
    assert not ingest(deployment).success
    assert deployment.count_loaded() == {}
    assert list_waiting(deployment) == [("Patient", "2024-01-05")]
    (tmp_path / "out").unlink()
    folder = find_folder(deployment, ingest(deployment, Refresh.MISSING).run_id)
    dead_letters = map(json.loads, (folder / "Patient.deadletters.ndjson").read_text().splitlines())
    assert sorted(dead_letter["resource"]["id"] for dead_letter in dead_letters) == ["a", "b"]
    assert list_waiting(deployment) == []


@pytest.mark.slow
def test_a_load_from_the_asset_graph_without_its_exports_is_in_the_folder_of_the_next_run(
    deployment: Deployment,
) -> None:
    layers = ("raw/patient", "validated/patient", "normalized/patient")
    assert materialize(deployment, *layers, windows=["2024-01-05"]).success
    assert list_folders(deployment) == []
    run_id = ingest(deployment, Refresh.MISSING).run_id
    assert list_ids(find_folder(deployment, run_id) / "Patient.valid.ndjson") == ["a"]


def test_a_post_writes_no_folder_and_the_next_run_includes_it(deployment: Deployment) -> None:
    with api_in_threads(deployment.settings) as api:
        post_patient(api, "posted")
    assert None not in list(build_loads(deployment).run())
    assert list_folders(deployment) == []
    now = datetime.now(UTC)
    ingestion = deployment.ingestion()
    due = ingestion.due_loads.find(first=now, last=now)
    assert ingestion.due_loads.extend(due) == ["Patient"], "the type is not idle while its window waits for an export"
    outcome = ingestion.load(due.ranges[0], refresh=Refresh.MISSING, triggered_by="test")
    assert outcome.success
    assert list_ids(find_folder(deployment, outcome.run_id) / "Patient.raw.ndjson") == ["posted"]
    assert list_waiting(deployment) == []


def test_runs_of_the_schedule_and_of_the_api_select_the_exports(deployment: Deployment) -> None:
    definitions = build_definitions(deployment.settings)
    exports = dg.AssetKey(["exports", "patient"])
    assert exports in select_all_layers(definitions.resolve_asset_graph(), ["Patient"])
    job = definitions.resolve_job_def(INCREMENTAL_LOAD)
    assert exports in job.asset_layer.selected_asset_keys


@pytest.mark.slow
def test_under_a_consent_policy_neither_received_resources_nor_dead_letters_are_written(
    deploy: Deploy, deployment: Deployment
) -> None:
    settings = deployment.settings.model_copy(update={"consent_policy": "opt-out"})
    withholding = Deployment(settings, deployment.instance)
    assert build_consent_gate(settings).withholds
    folder = find_folder(withholding, ingest(withholding).run_id)
    assert list_ids(folder / "Patient.valid.ndjson") == ["a"]
    assert not [*folder.glob("*.raw.ndjson"), *folder.glob("*.deadletters.ndjson")]
