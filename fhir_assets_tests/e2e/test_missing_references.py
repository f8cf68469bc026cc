"""Resources that are referenced but not loaded are fetched by id; ids unknown to the server are not requested again."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.definitions import build_definitions
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import encounter, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment

DAY = datetime(2024, 1, 5, tzinfo=UTC)


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    """Encounters of three patients: one of an earlier window, one before all windows, one that does not exist."""
    bodies = [
        patient("near", DAY - timedelta(days=2)),
        patient("old", DAY - timedelta(days=900)),
        *(encounter(f"e{n}", DAY, f"Patient/{name}") for n, name in enumerate(("near", "near", "old", "nowhere"))),
    ]
    with SandboxServer(bodies) as server:
        yield server


@pytest.fixture
def deployment(deploy: Deploy, server: SandboxServer) -> Deployment:
    return deploy(fhir_base_url=server.url, fhir_resource_types="Patient,Encounter", fhir_last_updated_gte="2024-01-01")


def requested_ids(server: SandboxServer) -> list[set[str]]:
    urls = [urlsplit(line.split(" ", 1)[1]) for line in server.stats()["recent"]]
    return [set(parse_qs(url.query)["_id"][0].split(",")) for url in urls if "_id" in parse_qs(url.query)]


def fetch(deployment: Deployment) -> None:
    ingestion = deployment.ingestion()
    assert ingestion.fetch_missing_references(triggered_by="test") is None
    for received in ingestion.find_received():
        outcome = ingestion.load_received(received, triggered_by="test")
        assert outcome.success
        assert deployment.unreconciled(outcome) == []


def patients_of_encounters(deployment: Deployment) -> list[tuple[str, bool]]:
    rows = deployment.query(
        "SELECT e.patient_key, p.id IS NOT NULL FROM fhir.encounter e LEFT JOIN fhir.patient p"
        " ON p.id = e.patient_key ORDER BY e.id"
    )
    return [(key, loaded) for key, loaded in rows]


def test_missing_patients_are_fetched_once_and_nonexistent_ones_are_not_requested_again(
    server: SandboxServer, deployment: Deployment
) -> None:
    deployment.ingest(first=DAY, last=DAY)
    assert {loaded for _, loaded in patients_of_encounters(deployment)} == {False}
    server.reset_stats()
    fetch(deployment)
    assert requested_ids(server) == [{"near", "old", "nowhere"}]
    assert patients_of_encounters(deployment) == [("near", True), ("near", True), ("old", True), ("nowhere", False)]

    server.reset_stats()
    fetch(deployment)
    assert requested_ids(server) == []
    assert deployment.query("SELECT resource_id FROM ops.missing_references") == [("nowhere",)]

    with connect(deployment.url) as conn:
        conn.execute("UPDATE ops.missing_references SET asked_at = now() - interval '25 hours'")
    fetch(deployment)
    assert requested_ids(server) == [{"nowhere"}]


def test_a_window_that_is_fetched_later_keeps_what_was_received_in_it(
    server: SandboxServer, deployment: Deployment
) -> None:
    deployment.ingest(first=DAY, last=DAY)
    fetch(deployment)
    for outcome in deployment.ingest(first=DAY - timedelta(days=4), last=DAY):
        assert outcome.success
        assert deployment.unreconciled(outcome) == []
    assert deployment.count_loaded() == {"Patient": 2, "Encounter": 4}


def test_missing_references_are_not_requested_from_a_file_source(
    deploy: Deploy, server: SandboxServer, deployment: Deployment
) -> None:
    deployment.ingest(first=DAY, last=DAY)
    files = deploy(
        fhir_source="ndjson",
        fhir_base_url=str(deployment.settings.home),
        fhir_resource_types="Patient,Encounter",
        fhir_last_updated_gte="2024-01-01",
    )
    fetch(files)
    assert deployment.query("SELECT count(*) FROM ops.missing_references") == [(0,)]


def test_the_command_fetches_missing_references_and_reports_the_result(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, server: SandboxServer
) -> None:
    deployment.ingest(first=DAY, last=DAY)
    for name, value in deployment.environment().items():
        monkeypatch.setenv(name, value)
    assert json.loads(CliRunner().invoke(app, ["missing-references", "list", "--json"]).stdout) == [
        {"target": "Patient", "references": 4, "missing": 4}
    ]
    output = json.loads(CliRunner().invoke(app, ["missing-references", "fetch", "--json"]).stdout)
    assert output["success"]
    assert {row["type"]: row["loaded"] for row in output["types"]} == {"Patient": 2, "total": 2}


def test_a_code_server_loads_all_definitions(deployment: Deployment) -> None:
    build_definitions(deployment.settings).get_repository_def().load_all_definitions()


def test_a_missing_reference_that_the_server_deleted_becomes_a_tombstone_and_an_unknown_one_does_not(
    server: SandboxServer, deployment: Deployment
) -> None:
    deployment.ingest(first=DAY, last=DAY)
    with FhirClient(server.url) as client:
        client.send("DELETE", "Patient/old")
    fetch(deployment)
    assert deployment.query("SELECT id FROM fhir.resource WHERE deleted_at IS NOT NULL") == [("old",)]
