"""The lake contains the same rows as the tables when DuckDB reads it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import duckdb
import pyarrow.parquet
import pytest
from typer.testing import CliRunner, Result

from fhir_assets.cli.main import app
from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.views import build_views
from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.views import View
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.lake import writer
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.consent_resources import DAY as DAY_OF_ALL
from fhir_assets_tests.support.consent_resources import consent, observation, resource
from fhir_assets_tests.support.content import add
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.lake_rows import in_lake, in_table
from fhir_assets_tests.support.small_population import END, RESOURCE_TYPES, START

DAY = "2024-01-01"


@pytest.fixture
def deployment(deploy: Deploy, tmp_path: Path) -> Deployment:
    """A deployment with three loaded types of a small population."""
    write_population(tmp_path / "population", Population(10, 3, 0.05, end=END, start=START))
    deployment = deploy(
        fhir_source="ndjson",
        fhir_base_url=str(tmp_path / "population"),
        fhir_resource_types=RESOURCE_TYPES,
        fhir_last_updated_gte=DAY,
        fhir_lake_url=str(tmp_path / "lake"),
    )
    assert all(outcome.success for outcome in deployment.ingest())
    return deployment


def views(deployment: Deployment) -> list[View]:
    return [view for view in build_views(deployment.settings).views if view.resource_type in RESOURCE_TYPES.split(",")]


def materialize(deployment: Deployment, *names: str, key: str = DAY) -> dict[str, dict[str, object]]:
    """Materialize lake assets of one window. Return their metadata by view."""
    job = build_definitions(deployment.settings).resolve_implicit_global_asset_job_def()
    keys = [dg.AssetKey(["lake", name]) for name in names]
    result = job.execute_in_process(instance=deployment.instance, partition_key=key, asset_selection=keys)
    assert result.success
    return {
        event.asset_key.path[-1]: {name: value.value for name, value in event.materialization.metadata.items()}
        for event in result.get_asset_materialization_events()
        if event.asset_key
    }


def lake_equals_table(deployment: Deployment, view: str) -> bool:
    with connect(deployment.url) as conn:
        return in_lake(deployment.settings.fhir_lake_url, view) == in_table(conn, view)


def test_duckdb_reads_the_same_rows_as_every_table(deployment: Deployment) -> None:
    names = [view.name for view in views(deployment)]
    materialize(deployment, *names)
    filled = [name for name in names if deployment.query(f"SELECT FROM fhir.{name} LIMIT 1")]
    assert len(filled) > 10
    assert [name for name in filled if not lake_equals_table(deployment, name)] == []
    for name in set(names) - set(filled):
        found = duckdb.execute(f"SELECT * FROM read_parquet('{deployment.settings.fhir_lake_url}/{name}/*/*.parquet')")
        assert (found.fetchall(), {"loaded_at"} - {column[0] for column in found.description}) == ([], set())


def test_columns_are_typed_and_described(deployment: Deployment) -> None:
    materialize(deployment, "observation")
    (file, *_) = Path(deployment.settings.fhir_lake_url, "observation").rglob("*.parquet")
    schema = pyarrow.parquet.read_schema(file)
    (view,) = [view for view in views(deployment) if view.name == "observation"]
    described = {column.name: column.description for column in view.columns if column.description}
    assert described
    for name, text in described.items():
        assert schema.field(name).metadata[b"comment"].decode().startswith(text)
    assert schema.field("patient_key").metadata[b"comment"] == b"The patient (-> fhir.patient.id)"
    assert pyarrow.parquet.ParquetFile(file).metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_second_run_rewrites_only_its_window(deployment: Deployment) -> None:
    first = materialize(deployment, "patient")["patient"]
    second = materialize(deployment, "patient")["patient"]
    windows = deployment.query(
        "SELECT count(DISTINCT partition_key) FROM fhir.resource WHERE resource_type = 'Patient'"
    )
    assert [(first["windows_written"],)] == windows
    assert second["windows_written"] == 1


def test_moved_and_deleted_rows_leave_their_old_window_whichever_window_is_materialized(deployment: Deployment) -> None:
    materialize(deployment, "patient")
    with_rows = deployment.query(
        "SELECT r.id, r.partition_key FROM fhir.patient v JOIN fhir.resource r ON r.id = v.id"
        " AND r.resource_type = 'Patient' ORDER BY r.partition_key DESC, r.id"
    )
    (moved, _), (deleted, _) = with_rows[:2]
    with connect(deployment.url) as conn:
        conn.execute(
            "UPDATE fhir.resource SET partition_key = %s, loaded_at = now()"
            " WHERE resource_type = 'Patient' AND id = %s",
            [DAY, moved],
        )
        conn.execute("DELETE FROM fhir.patient WHERE id = %s", [deleted])
        conn.commit()
    materialize(deployment, "patient", key=DAY)
    assert lake_equals_table(deployment, "patient")


def test_an_interrupted_lake_update_is_completed_by_the_next_one(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = writer.LakeFolder.write_window
    written: list[str] = []

    def fail_at_second_window(self: writer.LakeFolder, key: str, expected: int) -> int:
        if written:
            raise OSError(28, "No space left on device")
        written.append(key)
        return write(self, key, expected)

    with monkeypatch.context() as patch:
        patch.setattr(writer.LakeFolder, "write_window", fail_at_second_window)
        job = build_definitions(deployment.settings).resolve_implicit_global_asset_job_def()
        result = job.execute_in_process(
            instance=deployment.instance,
            partition_key=DAY,
            asset_selection=[dg.AssetKey(["lake", "observation"])],
            raise_on_error=False,
        )
        assert not result.success
    materialize(deployment, "observation")
    assert lake_equals_table(deployment, "observation")


@pytest.mark.slow
def test_withheld_and_deleted_resources_are_removed_from_the_lake(deploy: Deploy, tmp_path: Path) -> None:
    people = [resource("Patient", key, DAY_OF_ALL, name=[{"family": key}]) for key in "ab"]
    with SandboxServer([*people, *(observation(f"o{key}", key) for key in "ab")]) as server:
        deployment = deploy(
            fhir_base_url=server.url,
            fhir_resource_types="Patient,Observation,Consent",
            fhir_last_updated_gte=DAY,
            fhir_partition="monthly",
            fhir_deletes="history",
            fhir_lake_url=str(tmp_path / "lake"),
            consent_policy="opt-out",
        )

        def ingest_and_list_people() -> list[set[str]]:
            assert all(outcome.success for outcome in deployment.ingest())
            materialize(deployment, "patient", "observation")
            assert lake_equals_table(deployment, "patient")
            assert lake_equals_table(deployment, "observation")
            columns = [("patient", "id"), ("observation", "patient_key")]
            return [values(deployment, view, column) for view, column in columns]

        assert ingest_and_list_people() == [{"a", "b"}] * 2
        add(server, consent("deny", datetime.now(UTC)))
        assert ingest_and_list_people() == [{"b"}] * 2
        with FhirClient(server.url) as client:
            client.send("DELETE", "Patient/b")
            client.send("DELETE", "Observation/ob")
        assert ingest_and_list_people() == [set()] * 2
        add(server, consent("permit", datetime.now(UTC), version="2"))
        assert ingest_and_list_people() == [{"a"}] * 2


def values(deployment: Deployment, view: str, column: str) -> set[str]:
    """Return the values of a column of the lake."""
    files = list(map(str, Path(deployment.settings.fhir_lake_url, view).rglob("*.parquet")))
    rows = duckdb.execute(f"SELECT {column} FROM read_parquet(?)", [files]).fetchall() if files else []
    return {value for (value,) in rows}


def run_command(deployment: Deployment, monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    settings = deployment.settings
    monkeypatch.setenv("DB_URL", deployment.url)
    for name in ("fhir_source", "fhir_base_url", "fhir_last_updated_gte", "fhir_lake_url"):
        monkeypatch.setenv(name.upper(), str(getattr(settings, name)))
    monkeypatch.setenv("FHIR_ASSETS_HOME", str(settings.home))
    monkeypatch.setenv("FHIR_RESOURCE_TYPES", RESOURCE_TYPES)
    return CliRunner().invoke(app, list(words), catch_exceptions=False)


def test_the_command_writes_the_lake_and_says_what_it_did(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_command(deployment, monkeypatch, "lake", "--json")
    assert first.exit_code == 0, first.output
    tables = {row["table"]: row for row in json.loads(first.stdout)["tables"]}
    assert set(tables) == {view.name for view in views(deployment)}
    assert [(tables["patient"]["rows"],)] == deployment.query("SELECT count(*) FROM fhir.patient")
    assert lake_equals_table(deployment, "observation")
    assert not Path(deployment.settings.fhir_lake_url, ".spool").exists()
    again = run_command(deployment, monkeypatch, "lake", "--types", "Patient")
    assert (again.exit_code, "of which 0 changed" in again.stdout) == (0, True)
    with deployment_changes(deployment, "UPDATE ops.window_verdicts SET reconciled = false, faults = 'one is missing'"):
        held = run_command(deployment, monkeypatch, "lake", "--json", "--types", "Observation")
    assert held.exit_code == 1
    assert {window["type"] for window in json.loads(held.stdout)["held_back"]} == {"Observation"}


@contextmanager
def deployment_changes(deployment: Deployment, statement: str) -> Iterator[None]:
    """Change rows of observations, so that the lake has to be written, and keep windows red."""
    with connect(deployment.url) as conn:
        conn.execute("UPDATE fhir.observation SET loaded_at = now()")
        conn.execute("DELETE FROM fhir.observation WHERE id = (SELECT min(id) FROM fhir.observation)")
        conn.execute(statement.encode())
        conn.commit()
    yield


def test_ingest_writes_the_lake(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_command(deployment, monkeypatch, "ingest", "--json")
    assert result.exit_code == 0, result.output
    assert sum(row["rows"] for row in json.loads(result.stdout)["lake"])
    assert lake_equals_table(deployment, "patient")


def test_a_lake_that_cannot_be_written_does_not_hide_what_was_loaded(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lake").write_text("a file where the folder of the lake should be")
    result = run_command(deployment, monkeypatch, "ingest")
    assert result.exit_code == 1, result.output
    assert "All windows are loaded" in result.stdout
    assert "the lake is not written: cannot" in result.stderr.replace("\n", " ")


def test_the_command_needs_the_url(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FHIR_LAKE_URL", raising=False)
    with pytest.raises(ConfigurationError, match="FHIR_LAKE_URL is not set"):
        CliRunner().invoke(app, ["lake"], catch_exceptions=False)


def test_without_a_lake_url_there_are_no_lake_assets(deploy: Deploy) -> None:
    keys = build_definitions(deploy().settings).resolve_all_asset_keys()
    assert not [key for key in keys if key.path[0] == "lake"]
