"""Exports contain the resources of the store and the rows of the tables; every file is complete or absent."""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.deployment.store import build_blobs
from fhir_assets.errors import ConfigurationError, StoreError
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.storage.store import open_store
from fhir_assets.warehouse.exports.export import Export, TypeExport
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import add, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment, deploy

__all__ = ["deploy"]

DAY = datetime(2024, 1, 5, tzinfo=UTC)


@pytest.fixture
def loaded(deploy: Deploy, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    """A deployment with ten valid patients of two days and two invalid patients."""
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
    output: dict[str, Any] = json.loads(result.output)
    return output


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_each_layer_has_its_file_and_the_manifest_names_them(loaded: Deployment, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = export(
        "Patient", "-o", str(out), "--raw", "--valid", "--normalized", "--dead-letters", "--format", "parquet"
    )
    assert {resource["id"] for resource in lines(out / "Patient.raw.ndjson")} >= {"p0", "p9", "bad0", "bad1"}
    assert sorted(resource["id"] for resource in lines(out / "Patient.valid.ndjson")) == sorted(
        f"p{n}" for n in range(10)
    )
    exported = lines(out / "Patient.deadletters.ndjson")
    assert {dead_letter["resource"]["id"] for dead_letter in exported} == {"bad0", "bad1"}
    assert {dead_letter["rule"] for dead_letter in exported} == {"required-binding"}
    table = parquet.read_table(out / "patient.parquet")
    assert sorted(table.column("id").to_pylist()) == sorted(f"p{n}" for n in range(10))
    assert str(table.schema.field("birth_date").type) == "date32[day]"
    assert set(table.column("birth_date_precision").to_pylist()) == {"month"}
    assert table.schema.field("id").metadata[b"comment"]
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert manifest["files"] == output["files"]
    for file in manifest["files"]:
        content = (out / file["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])


def test_an_export_of_windows_has_the_resources_of_these_windows(loaded: Deployment, tmp_path: Path) -> None:
    export("Patient", "-o", str(tmp_path / "out"), "--valid", "--from", "2024-01-06", "--to", "2024-01-06")
    ids = {resource["id"] for resource in lines(tmp_path / "out" / "Patient.valid.ndjson")}
    assert ids == {f"p{n}" for n in range(1, 10, 2)}


def test_the_export_of_a_run_has_its_own_folder(loaded: Deployment, tmp_path: Path) -> None:
    [(run_id,)] = loaded.query("SELECT DISTINCT run_id FROM ops.ingestion_runs")
    output = export("all", "-o", str(tmp_path), "--run", run_id[:8], "--format", "csv")
    folder = Path(output["folder"])
    assert folder.parent == tmp_path / "exports"
    assert folder.name.startswith(f"run_{run_id}_")
    with (folder / "patient.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    names = lines_of_csv(folder / "patient_name.csv")
    assert {row["family"] for row in names} == {f"Fämily {n}" for n in range(10)}


def test_an_export_of_all_types_includes_loaded_types_that_the_settings_no_longer_name(
    loaded: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [(run_id,)] = loaded.query("SELECT DISTINCT run_id FROM ops.ingestion_runs")
    monkeypatch.setenv("FHIR_RESOURCE_TYPES", "Observation")
    for words in ((), ("--run", run_id)):
        output = export("all", "-o", str(tmp_path / "out"), "--valid", *words)
        assert {file["name"]: file["rows"] for file in output["files"]}["Patient.valid.ndjson"] == 10
    with pytest.raises(ConfigurationError, match="the run did not load Observation"):
        CliRunner().invoke(
            app, ["export", "Observation", "-o", str(tmp_path / "out"), "--run", run_id], catch_exceptions=False
        )


def lines_of_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_deleted_patient_is_not_exported(loaded: Deployment, tmp_path: Path) -> None:
    with connect(loaded.url) as conn:
        conn.execute("UPDATE fhir.resource SET resource = NULL, deleted_at = now() WHERE id = 'p3'")
    export("Patient", "-o", str(tmp_path / "out"), "--format", "ndjson")
    assert "p3" not in {resource["id"] for resource in lines(tmp_path / "out" / "Patient.valid.ndjson")}
    assert "p3" not in {resource["id"] for resource in lines(tmp_path / "out" / "patient.ndjson")}


def test_raw_resources_and_dead_letters_are_not_exported_with_a_consent_policy(
    loaded: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSENT_POLICY", "opt-out")
    for kind in ("--raw", "--dead-letters"):
        with pytest.raises(ConfigurationError, match="CONSENT_POLICY"):
            CliRunner().invoke(app, ["export", "Patient", "-o", str(tmp_path / "out"), kind], catch_exceptions=False)
    assert not list((tmp_path / "out").rglob("*.ndjson"))
    export("Patient", "-o", str(tmp_path / "out"), "--valid")


def test_an_export_writes_an_audit_record(loaded: Deployment, tmp_path: Path) -> None:
    export("Patient", "-o", str(tmp_path / "out"), "--valid")
    assert loaded.query("SELECT action, resource_type, count FROM ops.audit_log WHERE action = 'export'") == [
        ("export", "Patient", 10)
    ]


def content_of(folder: Path) -> dict[str, bytes]:
    """The content of every file, also of hidden ones, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail_to_export(loaded: Deployment, out: Path, write: Callable[[Export], object]) -> None:
    """Export the valid patients again, and then fail."""
    target = open_store(str(out), NO_ENCRYPTION).blobs
    with connect(loaded.url, cipher=NO_ENCRYPTION) as conn:
        with Export(conn, loaded.store, target, "", actor="test", withholding=False) as export:
            export.for_type("Patient", ["2024-01-05"]).write_valid()
            write(export)
            export.finish()


def test_an_export_that_fails_leaves_the_earlier_one_and_no_partial_file(loaded: Deployment, tmp_path: Path) -> None:
    def fail(path: Path) -> int:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    export("Patient", "-o", str(out))
    before = content_of(out)
    with pytest.raises(StoreError, match="No space left"):
        fail_to_export(loaded, out, lambda writer: writer.write("x.ndjson", "Patient", fail))
    assert content_of(out) == before


def test_an_export_whose_audit_record_cannot_be_written_leaves_the_earlier_one(
    loaded: Deployment, tmp_path: Path
) -> None:
    def lock_out(path: Path) -> int:
        with connect(loaded.url) as conn:
            conn.execute("ALTER TABLE ops.audit_log RENAME TO elsewhere")
        path.touch()
        return 1

    out = tmp_path / "out"
    export("Patient", "-o", str(out))
    before = content_of(out)
    with pytest.raises(psycopg.Error):
        fail_to_export(loaded, out, lambda writer: writer.write("Patient.valid.ndjson", "Patient", lock_out))
    assert content_of(out) == before


def test_an_export_to_a_bucket_that_fails_at_once_leaves_the_manifest_of_the_earlier_one(
    loaded: Deployment, s3_url: str
) -> None:
    def fail(path: Path) -> int:
        raise OSError(28, "No space left on device")

    files = ["manifest.json", *(file["name"] for file in export("Patient", "-o", s3_url)["files"])]
    target = build_blobs(loaded.settings, s3_url)
    before = {name: target.get(name) for name in files}
    assert None not in before.values()
    with connect(loaded.url, cipher=NO_ENCRYPTION) as conn, pytest.raises(StoreError, match="No space left"):
        with Export(conn, loaded.store, target, "", actor="test", withholding=False) as writer:
            writer.write("Patient.valid.ndjson", "Patient", fail)
    assert {name: target.get(name) for name in files} == before


def test_what_a_killed_export_left_in_the_spool_is_deleted_a_day_later(loaded: Deployment, tmp_path: Path) -> None:
    spool = tmp_path / "out" / ".spool"
    spool.mkdir(parents=True)
    for name, age in (("old", 25), ("new", 1)):
        (spool / name).touch()
        modified = (datetime.now(UTC) - timedelta(hours=age)).timestamp()
        os.utime(spool / name, (modified, modified))
    export("Patient", "-o", str(tmp_path / "out"))
    assert [path.name for path in spool.iterdir()] == ["new"]


def test_a_finished_or_failed_export_leaves_no_spool(loaded: Deployment, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export("Patient", "-o", str(out))
    assert [path for path in out.iterdir() if path.name.startswith(".")] == []

    def fail(path: Path) -> int:
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError):
        fail_to_export(loaded, out, lambda writer: writer.write("x.ndjson", "Patient", fail))
    assert [path for path in out.iterdir() if path.name.startswith(".")] == []


def test_a_resource_that_was_received_twice_does_not_hide_one_that_is_in_no_validated_partition(
    loaded: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = TypeExport._read_validated

    def read_without_p0_and_p2_twice(self: TypeExport) -> Iterator[Any]:
        for found in read(self):
            yield from {"p0": [], "p2": [found, found]}.get(found[1], [found])

    monkeypatch.setattr(TypeExport, "_read_validated", read_without_p0_and_p2_twice)
    export("Patient", "-o", str(tmp_path / "out"), "--valid")
    ids = {resource["id"] for resource in lines(tmp_path / "out" / "Patient.valid.ndjson")}
    assert ids == {f"p{n}" for n in range(10)}
