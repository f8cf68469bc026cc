"""A backfill loads a type and the missing resources to which it refers, in one run that counts both."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from fhir_assets.definitions import build_definitions
from fhir_assets.errors import ServerRefused, ServerUnavailable
from fhir_assets.orchestration.assets import missing_references
from fhir_assets.orchestration.jobs import BACKFILL
from fhir_assets.orchestration.received_windows import select_backfill
from fhir_assets.orchestration.run_requests import range_tags
from fhir_assets.orchestration.tags import RETRY_TAG
from fhir_assets.pipeline.missing_references.step import MissingReferencesStep
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.ops import run_history
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.alerts import AlertsSensor
from fhir_assets_tests.support.content import encounter, instant, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.uploads import read_back

DAY = datetime(2024, 1, 5, tzinfo=UTC)
TYPES = "Patient,Practitioner,Encounter"


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    """Encounters of patients of earlier windows; one patient refers to a practitioner, and one does not exist."""
    practitioner = {
        "resourceType": "Practitioner",
        "id": "d",
        "meta": {"versionId": "1", "lastUpdated": instant(DAY - timedelta(days=2))},
    }
    bodies = [
        patient("near", DAY - timedelta(days=1), generalPractitioner=[{"reference": "Practitioner/d"}]),
        patient("old", DAY - timedelta(days=900)),
        json.dumps(practitioner).encode(),
        encounter("e0", DAY, "Patient/near", partOf={"reference": "Encounter/whole"}),
        encounter("e1", DAY, "Patient/old"),
        encounter("e2", DAY, "Patient/nowhere"),
    ]
    with SandboxServer(bodies) as server:
        yield server


def run_backfill(deployment: Deployment, name: str) -> dg.ExecuteInProcessResult:
    """Execute the run that `POST /ingest/{type}/backfill` starts."""
    definitions = build_definitions(deployment.settings)
    graph = definitions.resolve_asset_graph()
    assets = select_backfill(graph, [name], deployment.settings.fhir_resource_types)
    job = definitions.resolve_job_def(BACKFILL).get_subset(asset_selection=set(assets))
    windows = deployment.ingestion().due_loads.find(first=DAY - timedelta(hours=1), last=DAY).ranges[0]
    return job.execute_in_process(instance=deployment.instance, tags=range_tags(windows), raise_on_error=False)


def read_counts(deployment: Deployment, run_id: str) -> dict[str, tuple[int, int, int]]:
    with connect(deployment.url) as conn:
        rows = run_history.list_types_of_run(conn, run_id)
    assert {row["status"] for row in rows} == {"SUCCESS"}
    return {row["resource_type"]: (row["fetched"], row["valid"], row["loaded"]) for row in rows}


def test_a_backfill_loads_the_missing_patients_of_its_resources_and_what_these_refer_to(
    deploy: Deploy, server: SandboxServer
) -> None:
    deployment = deploy(fhir_base_url=server.url, fhir_resource_types=TYPES, fhir_last_updated_gte="2024-01-01")
    result = run_backfill(deployment, "Encounter")
    assert result.success
    assert deployment.count_loaded() == {"Encounter": 3, "Patient": 2, "Practitioner": 1}
    assert read_counts(deployment, result.run_id) == {
        "Encounter": (3, 3, 3),
        "Patient": (2, 2, 2),
        "Practitioner": (1, 1, 1),
    }
    assert deployment.query("SELECT resource_id FROM ops.missing_references ORDER BY 1") == [("nowhere",), ("whole",)]
    assert deployment.ingestion().find_received() == [], "nothing is left to another run"
    assert deployment.query("SELECT DISTINCT reconciled FROM ops.window_verdicts") == [(True,)]
    shown = deployment.instance.get_materialized_partitions(dg.AssetKey(["normalized", "patient"]))
    assert "2024-01-04" in shown


def test_a_window_that_the_run_has_loaded_before_counts_both_loads(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Encounter ``whole`` appears in the window after the search of the run."""
    part = encounter("part", DAY, "Patient/a", partOf={"reference": "Encounter/whole"})
    with SandboxServer([part, patient("a", DAY)]) as server:

        def seed_and_fetch(step: Any, *counters: Any) -> Any:
            server.store.seed(encounter("whole", DAY, "Patient/a"), 0)
            return fetch(step, *counters)

        fetch = missing_references._fetch
        monkeypatch.setattr(missing_references, "_fetch", seed_and_fetch)
        deployment = deploy(fhir_base_url=server.url, fhir_resource_types=TYPES, fhir_last_updated_gte="2024-01-01")
        result = run_backfill(deployment, "Encounter")
    assert read_counts(deployment, result.run_id) == {"Encounter": (2, 2, 2), "Patient": (1, 1, 1)}


@pytest.mark.slow
def test_the_incident_of_references_that_could_not_be_fetched_ends_with_the_next_backfill(
    deploy: Deploy, server: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(
        fhir_base_url=server.url,
        fhir_resource_types=TYPES,
        fhir_last_updated_gte="2024-01-01",
        alert_webhook_url="http://127.0.0.1:9/",
    )
    sensor = AlertsSensor(deployment)
    with monkeypatch.context() as patched:

        def refuse(*_: Any) -> Any:
            raise ServerRefused("the server refused the search")

        patched.setattr(missing_references, "_fetch", refuse)
        assert not run_backfill(deployment, "Encounter").success
    sensor.tick()
    open_incidents = "SELECT name FROM ops.incidents WHERE kind = 'run' AND closed_at IS NULL"
    assert deployment.query(open_incidents) == [("backfill",)]
    assert run_backfill(deployment, "Encounter").success
    sensor.tick()
    assert deployment.query(open_incidents) == []
    assert deployment.count_loaded()["Patient"] == 2


@pytest.mark.slow
def test_a_backfill_delivers_and_exports_the_missing_references_that_it_loads(
    deploy: Deploy, server: SandboxServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """First the server fails after the Patients. What is loaded by then leaves with the next run."""
    types = ("Patient", "Practitioner", "Encounter")
    loaded_before_fetch: list[dict[str, int]] = []
    with SandboxServer([]) as target:
        deployment = deploy(
            fhir_base_url=server.url,
            fhir_resource_types=TYPES,
            fhir_last_updated_gte="2024-01-01",
            fhir_delivery_url=target.url,
            fhir_export_url=str(tmp_path),
        )
        fetch = MissingReferencesStep._fetch

        def fail_at_practitioners(step: Any, name: str, ids: Any) -> Any:
            loaded_before_fetch.append(deployment.count_loaded())
            if name == "Practitioner":
                raise ServerUnavailable("the server is down")
            return fetch(step, name, ids)

        with monkeypatch.context() as patched:
            patched.setattr(MissingReferencesStep, "_fetch", fail_at_practitioners)
            failed = run_backfill(deployment, "Encounter")
        assert not failed.success
        run = deployment.instance.get_run_by_id(failed.run_id)
        assert run
        assert run.tags[RETRY_TAG] == "true"
        assert loaded_before_fetch[1]["Patient"] == 2, "each batch is loaded before the next is fetched"
        assert read_back(target.url, types) == {}
        second = run_backfill(deployment, "Encounter")
        assert second.success
        expected = {"Encounter/e0", "Encounter/e1", "Encounter/e2", "Patient/near", "Patient/old", "Practitioner/d"}
        assert set(read_back(target.url, types)) == expected
        (folder,) = tmp_path.glob("exports/*")
        assert folder.name.startswith(f"run_{second.run_id}_")
        written = {path.name for path in folder.glob("*.manifest.json")}
        assert written == {"Encounter.manifest.json", "Patient.manifest.json", "Practitioner.manifest.json"}
        assert deployment.query("SELECT * FROM ops.held_windows") == []
