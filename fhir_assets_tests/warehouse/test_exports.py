"""Exports hold what the store and the tables hold, whole or not at all."""

import csv
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.errors import ConfigurationError, StoreError
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.storage.store import open_store
from fhir_assets.warehouse.exports.export import Export
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import add, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment, deploy

__all__ = ["deploy"]

DAY = datetime(2024, 1, 5, tzinfo=UTC)


@pytest.fixture
def loaded(deploy: Deploy, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    """Ten patients in two days, and two bad ones."""
    with SandboxServer([]) as server:
        for n in range(10):
            body = patient(f"p{n}", DAY.replace(day=5 + n % 2), name=[{"family": f"Fämily {n}"}], birthDate="1970-02")
            add(server, body)
        for n in range(2):
            add(server, patient(f"bad{n}", DAY, gender="malee"))
        deployment = deploy(fhir_base_url=server.url, fhir_last_updated_gte="2024-01-05", fhir_resource_types="Patient")
        deployment.ingest(first=DAY, last=DAY.replace(day=6))
    settings = deployment.settings
    monkeypatch.setenv("DB_URL", deployment.url)
    monkeypatch.setenv("FHIR_ASSETS_HOME", str(settings.home))
    monkeypatch.setenv("FHIR_LAST_UPDATED_GTE", "2024-01-05")
    return deployment


def export(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["export", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_each_layer_has_its_file_and_the_manifest_names_them(loaded: Deployment, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = export(
        "Patient", "-o", str(out), "--raw", "--valid", "--normalized", "--dead-letters", "--format", "parquet"
    )
    assert {each["id"] for each in lines(out / "Patient.raw.ndjson")} >= {"p0", "p9", "bad0", "bad1"}
    assert sorted(each["id"] for each in lines(out / "Patient.valid.ndjson")) == sorted(f"p{n}" for n in range(10))
    letters = lines(out / "Patient.deadletters.ndjson")
    assert {letter["resource"]["id"] for letter in letters} == {"bad0", "bad1"}
    assert {letter["rule"] for letter in letters} == {"required-binding"}
    table = parquet.read_table(out / "patient.parquet")
    assert sorted(table.column("_resource_key").to_pylist()) == sorted(f"p{n}" for n in range(10))
    assert str(table.schema.field("birth_date").type) == "date32[day]"
    assert set(table.column("birth_date_precision").to_pylist()) == {"month"}
    assert table.schema.field("_resource_key").metadata[b"comment"]
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert manifest["files"] == found["files"]
    for file in manifest["files"]:
        content = (out / file["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])


def test_windows_bound_what_leaves(loaded: Deployment, tmp_path: Path) -> None:
    export("Patient", "-o", str(tmp_path / "out"), "--valid", "--from", "2024-01-06", "--to", "2024-01-06")
    found = {each["id"] for each in lines(tmp_path / "out" / "Patient.valid.ndjson")}
    assert found == {f"p{n}" for n in range(1, 10, 2)}


def test_a_run_is_exported_into_a_folder_of_its_own(loaded: Deployment, tmp_path: Path) -> None:
    [(run_id,)] = loaded.query("SELECT DISTINCT run_id FROM ops.ingestion_runs")
    found = export("all", "-o", str(tmp_path), "--run", run_id[:8], "--format", "csv")
    folder = Path(found["folder"])
    assert folder.parent == tmp_path / "exports"
    assert folder.name.startswith(f"run_{run_id}_")
    with (folder / "patient.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    names = lines_of_csv(folder / "patient_name.csv")
    assert {row["family"] for row in names} == {f"Fämily {n}" for n in range(10)}


def lines_of_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_deleted_patient_does_not_leave(loaded: Deployment, tmp_path: Path) -> None:
    with connect(loaded.url) as conn:
        conn.execute("UPDATE fhir.resource SET resource = NULL, deleted_at = now() WHERE id = 'p3'")
    export("Patient", "-o", str(tmp_path / "out"), "--format", "ndjson")
    assert "p3" not in {each["id"] for each in lines(tmp_path / "out" / "Patient.valid.ndjson")}
    assert "p3" not in {each["_resource_key"] for each in lines(tmp_path / "out" / "patient.ndjson")}


def test_raw_and_dead_letters_stay_where_consent_withholds(
    loaded: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSENT_POLICY", "opt-out")
    for kind in ("--raw", "--dead-letters"):
        with pytest.raises(ConfigurationError, match="CONSENT_POLICY"):
            CliRunner().invoke(app, ["export", "Patient", "-o", str(tmp_path / "out"), kind], catch_exceptions=False)
    assert not list((tmp_path / "out").rglob("*.ndjson"))
    export("Patient", "-o", str(tmp_path / "out"), "--valid")


def test_an_export_is_on_record(loaded: Deployment, tmp_path: Path) -> None:
    export("Patient", "-o", str(tmp_path / "out"), "--valid")
    assert loaded.query("SELECT action, resource_type, count FROM ops.audit_log WHERE action = 'export'") == [
        ("export", "Patient", 10)
    ]


def test_a_full_disk_is_a_sentence_and_leaves_no_half_file(loaded: Deployment, tmp_path: Path) -> None:
    def breaks(path: Path) -> int:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    target = open_store(str(tmp_path / "out"), NO_ENCRYPTION).blobs
    target.put("manifest.json", b"of an earlier export")
    with connect(loaded.url, cipher=NO_ENCRYPTION) as conn, pytest.raises(StoreError, match="No space left"):
        Export(conn, loaded.store, target, "", actor="test", withholding=False).write("x.ndjson", "Patient", breaks)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
