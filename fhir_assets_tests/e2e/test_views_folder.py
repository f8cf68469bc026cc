"""A view in FHIR_VIEWS is an asset and a table; a changed view changes both; an invalid view is reported."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.definitions import build_definitions
from fhir_assets.errors import ConfigurationError
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.warehouse.postgres.db.connections import normalise_url
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.deployment import Deploy, Deployment

pytestmark = pytest.mark.slow

DAY = datetime(2024, 1, 5, tzinfo=UTC)
KEY = dg.AssetKey(["normalized", "patient_birth"])
TYPES = (
    "SELECT column_name, data_type FROM information_schema.columns"
    " WHERE table_schema = 'fhir' AND table_name = 'patient_birth' AND column_name NOT LIKE '\\_%%' ORDER BY 1"
)

LOADED_AT = ("loaded_at", "timestamp with time zone")

Column = dict[str, str]
ID: Column = {"name": "id", "path": "getResourceKey()", "type": "string", "description": "Key of the patient"}
BORN: Column = {"name": "born", "path": "birthDate", "type": "date", "description": "Day of birth"}
TWIN: Column = {"name": "twin", "path": "multipleBirth.ofType(boolean)", "type": "boolean"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of FHIR_VIEWS."""
    folder = tmp_path / "views"
    folder.mkdir()
    return folder


@pytest.fixture
def deployment(deploy: Deploy, tmp_path: Path, folder: Path) -> Deployment:
    data = tmp_path / "data"
    data.mkdir()
    bodies = [patient("a", DAY, birthDate="1980-02-03", multipleBirthBoolean=True), patient("b", DAY)]
    (data / "Patient.ndjson").write_bytes(b"\n".join(bodies) + b"\n")
    return deploy(
        fhir_source="ndjson",
        fhir_base_url=str(data),
        fhir_resource_types="Patient",
        fhir_views=folder,
        fhir_last_updated_gte="2024-01-01",
    )


def write_view(folder: Path, *columns: Column, name: str = "patient_birth", **changed: Any) -> None:
    """Write a view of Patient into the folder."""
    definition = {
        "resourceType": "ViewDefinition",
        "name": name,
        "status": "active",
        "resource": "Patient",
        "description": "Births.",
        "select": [{"column": columns}],
        **changed,
    }
    (folder / f"{name}.json").write_text(json.dumps(definition))


def load(deployment: Deployment) -> tuple[bool, str]:
    """Load the window again. Return whether it succeeded, and the error."""
    (outcome,) = deployment.ingest(first=DAY, last=DAY, refresh=Refresh.WINDOW)
    reasons = deployment.query("SELECT DISTINCT error FROM ops.ingestion_runs WHERE run_id = %s", outcome.run_id)
    return outcome.success, " ".join(str(reason) for (reason,) in reasons if reason)


def spec(deployment: Deployment) -> dg.AssetSpec:
    """Return the asset of the view after a reload."""
    specs = build_definitions(deployment.settings).resolve_all_asset_specs()
    (spec,) = [spec for spec in specs if spec.key == KEY]
    return spec


def migrate(deployment: Deployment, *options: str) -> subprocess.CompletedProcess[str]:
    """Run ``fhir-assets migrate``."""
    settings = deployment.settings
    environment = {
        **os.environ,
        "FHIR_ASSETS_HOME": str(settings.home),
        "FHIR_VIEWS": str(settings.fhir_views),
        "DB_URL": deployment.url,
        "DAGSTER_POSTGRES_URL": normalise_url(deployment.url, "psycopg2"),
    }
    command = [sys.executable, "-c", "from fhir_assets.cli import main; main()", "migrate", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_dropped_view_is_an_asset_with_its_columns_and_a_table_with_its_comments(
    deployment: Deployment, folder: Path
) -> None:
    write_view(folder, ID, BORN, url="https://example.org/births", version="7")
    asset = spec(deployment)
    assert asset.description == "Births."
    columns = {c.name: (c.type, c.description) for c in asset.metadata["dagster/column_schema"].columns}
    message = "Precision of born: year, month or day"
    assert columns == {
        "id": ("text", "Key of the patient (-> fhir.patient.id)"),
        "born": ("date", "Day of birth"),
        "born_precision": ("text", message),
        "loaded_at": (
            "timestamp with time zone",
            "Start of the transaction that wrote the row, which readers see when it ends",
        ),
    }
    assert (asset.metadata["view_url"], asset.metadata["view_version"]) == ("https://example.org/births", "7")
    assert load(deployment) == (True, "")
    assert deployment.query("SELECT id, born::text, born_precision FROM fhir.patient_birth ORDER BY 1") == [
        ("a", "1980-02-03", "day"),
        ("b", None, None),
    ]
    comments = deployment.query(
        "SELECT obj_description(attrelid), col_description(attrelid, attnum) FROM pg_attribute"
        " WHERE attrelid = 'fhir.patient_birth'::regclass AND attname = 'born'"
    )
    assert comments == [("Births.", "Day of birth")]


def test_a_new_column_is_added_and_filled_and_the_asset_counts_as_changed(deployment: Deployment, folder: Path) -> None:
    write_view(folder, ID, BORN)
    before = spec(deployment).code_version
    assert load(deployment) == (True, "")
    write_view(folder, ID, BORN, TWIN)
    assert spec(deployment).code_version != before
    assert load(deployment) == (True, "")
    assert deployment.query("SELECT id, twin FROM fhir.patient_birth ORDER BY 1") == [("a", True), ("b", None)]
    assert deployment.query("SELECT count(*) FROM fhir.patient") == [(2,)]


def test_a_changed_description_does_not_make_an_asset_stale(deployment: Deployment, folder: Path) -> None:
    write_view(folder, ID, BORN)
    before = spec(deployment).code_version
    write_view(folder, ID, BORN | {"description": "Said otherwise"}, description="Said otherwise")
    assert spec(deployment).code_version == before


@pytest.mark.parametrize(
    ("columns", "message", "types"),
    [
        ((ID,), "column born is in the table but not in the view", [("id", "text"), LOADED_AT]),
        pytest.param(
            (ID, BORN | {"path": "birthDate.toString()", "type": "string"}),
            "column born is date in the table but text in the view",
            [("born", "text"), ("id", "text"), LOADED_AT],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_change_that_loses_data_is_refused_until_it_is_requested(
    deployment: Deployment, folder: Path, columns: tuple[Column, ...], message: str, types: list[tuple[str, str]]
) -> None:
    write_view(folder, ID, BORN)
    assert load(deployment) == (True, "")
    rows = deployment.query("SELECT * FROM fhir.patient_birth")
    write_view(folder, *columns)
    success, reason = load(deployment)
    assert not success
    assert message in reason
    assert "fhir-assets migrate --apply-view-changes" in reason
    assert deployment.query("SELECT * FROM fhir.patient_birth") == rows
    plain = migrate(deployment)
    assert plain.returncode == 1
    assert message in plain.stderr
    assert "Traceback" not in plain.stderr
    applied = migrate(deployment, "--apply-view-changes")
    assert applied.returncode == 0, applied.stderr
    assert deployment.query(TYPES) == types
    assert load(deployment) == (True, "")
    assert deployment.query("SELECT id FROM fhir.patient_birth ORDER BY 1") == [("a",), ("b",)]


def test_an_invalid_view_is_shown_in_the_ui_and_stops_no_other_view(deployment: Deployment, folder: Path) -> None:
    write_view(folder, ID, BORN)
    write_view(folder, ID, {"name": "x", "path": "birthDay", "type": "date"}, name="misspelt")
    (folder / "torn.json").write_text('{"resourceType": ')
    specs = build_definitions(deployment.settings).resolve_all_asset_specs()
    broken = {asset.key.path[-1]: asset.description or "" for asset in specs if asset.group_name == "broken_views"}
    assert set(broken) == {"misspelt", "torn"}
    assert "birthDate" in broken["misspelt"]
    assert load(deployment) == (True, "")
    assert deployment.query("SELECT count(*) FROM fhir.patient_birth") == [(2,)]
    output = migrate(deployment)
    assert output.returncode == 0
    assert "misspelt.json" in output.stdout.replace("\n", "")


WITHOUT_TABLE = {
    "own_system": ([ID | {"name": "tableoid"}], "system column"),
    "own_wide": ([BORN | {"name": f"c{n}"} for n in range(900)], "at most 1600"),
    "own_long": ([ID | {"name": "x" * 64}], "63 bytes"),
    "own_precision": ([BORN, ID | {"name": "born_precision"}], "two columns"),
    "own_digit": ([ID | {"name": "1st"}], "not begin with a digit"),
    "own_unicode": ([ID | {"name": "größe"}], "must consist of"),
    "own_key": ([ID | {"name": "_resource_key"}], "not begin with a digit or _"),
    "own_nested": ([ID, {"name": "a", "path": "extension." * 30 + "url.first()"}], "column a: its path and"),
    "own_endless": ([ID, {"name": "a", "path": "active" + ".not()" * 3000}], "nested too deeply"),
    "own_nul": ([ID | {"description": "\0"}], "NUL"),
    "own_twice": ([ID, ID], "two columns"),
    "resource": ([ID], "belongs to a relation"),
}
"""Views that can have no table: their columns, and words of the reason."""


def test_a_view_that_can_have_no_table_stops_no_other_view_and_every_command_names_it(
    deployment: Deployment, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_view(folder, ID, BORN)
    for name, (columns, _) in WITHOUT_TABLE.items():
        write_view(folder, *columns, name=name)
    for variable, value in {**deployment.environment(), "FHIR_VIEWS": str(folder)}.items():
        monkeypatch.setenv(variable, value)
    for command in ("ingest", "view list"):
        done = CliRunner().invoke(app, command.split())
        assert done.exit_code == 1
        lines = done.output.splitlines()
        for name, (_, words) in WITHOUT_TABLE.items():
            assert any(f"view {name}" in line and words in line for line in lines), (command, name, done.output)
    for name, (_, words) in WITHOUT_TABLE.items():
        done = CliRunner().invoke(app, ["view", "check", f"{folder}/{name}.json"])
        assert (done.exit_code, words in done.output) == (1, True), done.output
    assert deployment.query("SELECT count(*) FROM fhir.patient_birth") == [(2,)]


def test_an_export_that_lacks_the_table_of_a_broken_view_says_so(
    deployment: Deployment, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_view(folder, ID | {"name": "ctid"}, name="own_system")
    assert load(deployment) == (True, "")
    for variable, value in {**deployment.environment(), "FHIR_VIEWS": str(folder)}.items():
        monkeypatch.setenv(variable, value)
    done = CliRunner().invoke(app, ["export", "all", "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "view own_system" in done.output
    assert (tmp_path / "out" / "patient.parquet").exists()
    assert CliRunner().invoke(app, ["export", "all", "-o", str(tmp_path / "out"), "--valid"]).exit_code == 0


def test_migrate_adds_the_columns_of_an_extended_view_and_makes_marts_and_foreign_keys(
    deployment: Deployment, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(deployment) == (True, "")
    [(version,)] = deployment.query("SELECT current_setting('server_version_num')::int")
    monkeypatch.setenv("FHIR_FOREIGN_KEYS", str(version >= 180_000))
    extension = {"extends": "patient", "select": [{"column": [TWIN]}]}
    (folder / "mine.json").write_text(json.dumps(extension))
    done = migrate(deployment)
    assert done.returncode == 0, done.stderr
    assert deployment.query("SELECT id, twin, birth_date::text FROM fhir.patient ORDER BY 1") == [
        ("a", True, "1980-02-03"),
        ("b", None, None),
    ]
    assert deployment.query("SELECT id, twin FROM marts.patient_current ORDER BY 1") == [("a", True), ("b", None)]
    keys = deployment.query("SELECT count(*) > 300 FROM pg_constraint WHERE conname LIKE 'fhir\\_assets\\_%%'")
    assert keys == [(version >= 180_000,)]


def test_a_folder_of_views_that_does_not_exist_is_an_error(deployment: Deployment, folder: Path) -> None:
    folder.rmdir()
    with pytest.raises(ConfigurationError, match="FHIR_VIEWS: there is no folder"):
        build_definitions(deployment.settings)


def test_a_resource_with_two_values_for_one_column_is_a_dead_letter_until_the_view_is_corrected(
    deployment: Deployment, folder: Path, tmp_path: Path
) -> None:
    two = patient("c", DAY, name=[{"family": "A"}, {"family": "B"}])
    (tmp_path / "data" / "More.Patient.ndjson").write_bytes(two + b"\n")
    write_view(folder, ID, {"name": "family", "path": "name.family", "type": "string"}, name="patient_family")
    assert load(deployment) == (True, "")
    dead_letters = "SELECT resource_id, stage, path, status FROM ops.dead_letters"
    assert deployment.query(dead_letters) == [("c", "transform", "patient_family.family", "open")]
    assert deployment.count_loaded() == {"Patient": 2}
    write_view(folder, ID, {"name": "family", "path": "name.family.first()", "type": "string"}, name="patient_family")
    (outcome,) = deployment.ingest(first=DAY, last=DAY, refresh=Refresh.MISSING)
    assert outcome.success
    assert deployment.query(dead_letters) == [("c", "transform", "patient_family.family", "resolved")]
    assert deployment.count_loaded() == {"Patient": 3}
