"""Deliveries, exports and the lake hold back windows that do not reconcile, and include them once they do."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import duckdb
import pytest

from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.ops import window_verdicts
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import add, materialize, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.uploads import read_back

DAY = datetime(2024, 1, 5, tzinfo=UTC)
RED, GREEN, LATER = "2024-01-05", "2024-01-06", "2024-01-07"
LAYERS = ("raw/patient", "validated/patient", "normalized/patient")


@pytest.fixture
def target() -> Iterator[SandboxServer]:
    with SandboxServer() as server:
        yield server


@pytest.fixture
def source() -> Iterator[SandboxServer]:
    with SandboxServer([]) as server:
        for day in range(3):
            add(server, *(patient(f"d{day}-{n}", DAY + timedelta(days=day, hours=n)) for n in range(3)))
        yield server


@pytest.fixture
def deployment(deploy: Deploy, source: SandboxServer, target: SandboxServer, tmp_path: Path) -> Deployment:
    """Three loaded windows; a row of the first was deleted by hand, and the check of the window evaluated again."""
    deployment = deploy(
        fhir_base_url=source.url,
        fhir_delivery_url=target.url,
        fhir_lake_url=str(tmp_path / "lake"),
        fhir_export_url=str(tmp_path / "exported"),
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-05",
    )
    assert materialize(deployment, *LAYERS, windows=[RED, GREEN, LATER]).success
    lose_a_row(deployment)
    return deployment


def lose_a_row(deployment: Deployment) -> None:
    deployment.query("DELETE FROM fhir.resource WHERE id = 'd0-0' RETURNING id")
    assert materialize(deployment, windows=[RED]).success
    with connect(deployment.url) as conn:
        assert "in the tables" in window_verdicts.find_faults(conn, "Patient", [RED])[RED]


def repair(deployment: Deployment) -> None:
    """Load the red window again, without anything that evaluates its check."""
    assert materialize(deployment, "normalized/patient", windows=[RED]).success


def events(deployment: Deployment, key: str) -> dict[str, dict[str, object]]:
    """Return the metadata of the latest materialization of each partition of an asset."""
    asset = dg.AssetKey(key.split("/"))
    records = deployment.instance.fetch_materializations(asset, limit=100).records
    return {
        record.partition_key: {name: value.value for name, value in record.asset_materialization.metadata.items()}
        for record in reversed(records)
        if record.partition_key and record.asset_materialization
    }


def log_of(deployment: Deployment, result: dg.ExecuteInProcessResult) -> str:
    records = deployment.instance.get_records_for_run(result.run_id).records
    return "\n".join(record.event_log_entry.message for record in records)


def lake_days(deployment: Deployment) -> set[str]:
    return {path.parent.name.partition("=")[2] for path in Path(deployment.settings.fhir_lake_url).rglob("*.parquet")}


def test_a_delivery_passes_over_a_red_window_and_takes_it_up_in_a_run_of_another_window(
    deployment: Deployment, target: SandboxServer
) -> None:
    result = materialize(deployment, "delivered/patient", windows=[RED, GREEN], refresh=Refresh.MISSING)
    assert result.success
    assert {key.split("/")[1][:2] for key in read_back(target.url, ["Patient"])} == {"d1"}
    delivered = events(deployment, "delivered/patient")
    assert list(delivered) == [GREEN], "a window that is held back is not shown as delivered"
    assert delivered[GREEN]["windows_held_back"] == 1
    assert RED in str(delivered[GREEN]["held_back"])
    assert f"held back because they do not reconcile: {RED}" in log_of(deployment, result)
    repair(deployment)
    result = materialize(deployment, "delivered/patient", windows=[LATER], refresh=Refresh.MISSING)
    assert result.success
    assert {key.split("/")[1][:2] for key in read_back(target.url, ["Patient"])} == {"d0", "d1", "d2"}
    assert events(deployment, "delivered/patient").keys() == {RED, GREEN, LATER}
    assert f"reconcile now: {RED}" in log_of(deployment, result)
    assert deployment.query("SELECT FROM ops.held_windows WHERE starts_with(destination, 'delivered')") == []


def test_the_load_that_makes_a_window_red_does_not_deliver_it(
    deploy: Deploy, source: SandboxServer, target: SandboxServer
) -> None:
    deployment = deploy(
        fhir_base_url=source.url,
        fhir_delivery_url=target.url,
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-05",
    )
    deployment.ingest(first=DAY, last=DAY + timedelta(days=1))
    with connect(deployment.url) as conn:
        conn.execute(
            "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
            "CREATE TRIGGER lose BEFORE INSERT ON fhir.resource FOR EACH ROW"
            " WHEN (NEW.id = 'lost') EXECUTE FUNCTION lose()"
        )
        conn.commit()
    add(source, patient("lost", DAY), patient("new", DAY + timedelta(days=1)))
    [run] = deployment.ingest(first=DAY, last=DAY + timedelta(days=1), refresh=Refresh.WINDOW)
    assert run.success
    assert len(deployment.unreconciled(run)) == 2, "the window and the summary of the run"
    delivered = read_back(target.url, ["Patient"])
    assert "Patient/new" in delivered
    assert "Patient/lost" not in delivered
    assert deployment.query("SELECT resource_type, partition_key FROM ops.held_windows") == [("Patient", RED)]


def test_the_lake_leaves_a_red_window_out_and_the_next_update_writes_it(deployment: Deployment) -> None:
    assert materialize(deployment, "lake/patient", windows=[RED, GREEN]).success
    assert lake_days(deployment) == {GREEN, LATER}
    assert list(events(deployment, "lake/patient")) == [GREEN]
    repair(deployment)
    assert materialize(deployment, "lake/patient", windows=[GREEN]).success
    assert lake_days(deployment) == {RED, GREEN, LATER}


def test_a_file_of_the_lake_stays_while_its_window_is_red_unless_the_table_lost_one_of_its_rows(
    deployment: Deployment,
) -> None:
    repair(deployment)
    assert materialize(deployment, "lake/patient", windows=[RED]).success
    with connect(deployment.url) as conn:
        window_verdicts.invalidate(conn, "Patient", [GREEN])
        changes = window_verdicts.read_changes(conn, "Patient", [GREEN])
        window_verdicts.record(conn, "Patient", {GREEN: ["one is missing"]}, changes)
        conn.commit()
        file = f"{deployment.settings.fhir_lake_url}/patient/partition_key={GREEN}/rows.parquet"
        before = duckdb.read_parquet(file).fetchall()
    lose_a_row(deployment)
    assert materialize(deployment, "lake/patient", windows=[RED]).success
    assert lake_days(deployment) == {GREEN, LATER}, "the file of the red window had a row that the table lost"
    assert duckdb.read_parquet(file).fetchall() == before


def test_an_export_leaves_a_red_window_out_names_it_and_includes_it_once_it_reconciles(deployment: Deployment) -> None:
    assert materialize(deployment, "exports/patient", windows=[RED, GREEN]).success

    def exported() -> tuple[list[str], list[str]]:
        folder = max(
            Path(deployment.settings.fhir_export_url, "exports").iterdir(), key=lambda path: path.stat().st_mtime
        )
        lines = (folder / "Patient.valid.ndjson").read_text().splitlines()
        manifest = json.loads((folder / "Patient.manifest.json").read_text())
        return sorted({json.loads(line)["id"][:2] for line in lines}), list(manifest["unreconciled"].get("Patient", ()))

    assert exported() == (["d1", "d2"], [RED]), "the third window was loaded, and was in no export yet"
    repair(deployment)
    assert materialize(deployment, "exports/patient", windows=[LATER]).success
    assert exported() == (["d0", "d2"], [])


def test_windows_without_a_verdict_are_evaluated_before_they_leave(
    deployment: Deployment, target: SandboxServer
) -> None:
    """As after an upgrade: nothing was recorded about windows that were loaded before."""
    deployment.query("DELETE FROM ops.window_verdicts RETURNING 1")
    assert materialize(deployment, "delivered/patient", windows=[RED, GREEN], refresh=Refresh.MISSING).success
    assert {key.split("/")[1][:2] for key in read_back(target.url, ["Patient"])} == {"d1"}


def test_an_evaluation_from_before_a_change_of_a_window_is_not_recorded(deployment: Deployment) -> None:
    with connect(deployment.url) as conn:
        changes = window_verdicts.read_changes(conn, "Patient", [GREEN])
        window_verdicts.invalidate(conn, "Patient", [GREEN])
        window_verdicts.record(conn, "Patient", {GREEN: []}, changes)
        assert window_verdicts.find_faults(conn, "Patient", [GREEN]) == {GREEN: window_verdicts.NOT_EVALUATED}
