"""`fhir-assets dead-letters edit` receives a corrected resource into the store of the deployment."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.deployment.store import build_store
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.ops import dead_letters
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres.db.connections import connect

CORRECTED = b'{"resourceType":"Patient","id":"p","meta":{"lastUpdated":"2024-01-01T10:00:00Z"}}'


def test_a_correction_of_a_fetched_resource_is_received_into_a_store_in_a_bucket(
    database: str, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_URL", database)
    monkeypatch.setenv("FHIR_STORE_URL", s3_url)
    monkeypatch.setenv("FHIR_ASSETS_HOME", str(tmp_path))
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        dead_letters.record(
            conn, "run", [DeadLetter("Patient", None, "fetch", "no-id", "", "", b'{"resourceType":"Patient"}', "")]
        )
        [(dead_letter_id,)] = conn.execute("SELECT id FROM ops.dead_letters").fetchall()
    (tmp_path / "corrected.json").write_bytes(CORRECTED)

    arguments = ["dead-letters", "edit", str(dead_letter_id), "--resource", str(tmp_path / "corrected.json"), "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)

    assert json.loads(result.output)["received"]
    store = build_store(load_settings())
    [manifest] = store.manifests("raw", "Patient", ["2024-01-01"])
    assert list(store.batches(manifest.parts)) == [[CORRECTED]]
