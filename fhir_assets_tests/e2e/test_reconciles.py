"""The check ``reconciles`` fails when resources are missing, reports how many, and passes after the advised repair."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest

from fhir_assets.sandbox.faults import Fault, FaultKind, RequestKind
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.storage.manifest import Manifest
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import materialize, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment

DAY = datetime(2024, 1, 5, tzinfo=UTC)
KEY = "2024-01-05"
NEXT = "2024-01-06"
LAYERS = ("raw/patient", "validated/patient", "normalized/patient")


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    bodies = [patient(f"p{n}", DAY + timedelta(hours=n), gender="male", name=[{"family": "N"}]) for n in range(30)]
    with SandboxServer(bodies) as server:
        yield server


@pytest.fixture
def deployment(deploy: Deploy, server: SandboxServer) -> Deployment:
    return deploy(
        fhir_base_url=server.url,
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-01",
        fhir_page_size=5,
        fhir_max_attempts=1,
    )


def evaluations(deployment: Deployment, run_id: str) -> dict[str | None, dg.AssetCheckEvaluation]:
    """Return the run's evaluations by partition; the evaluation of a range has the key None."""
    return {evaluation.partition: evaluation for evaluation in deployment.checks(run_id)}


def number(evaluation: dg.AssetCheckEvaluation, name: str) -> object:
    return evaluation.metadata[name].value


def run_check(deployment: Deployment, *windows: str) -> dg.AssetCheckEvaluation:
    """Execute only the check and return its evaluation."""
    result = materialize(deployment, windows=list(windows or [KEY]))
    assert result.success
    (evaluation,) = deployment.checks(result.run_id)
    return evaluation


def execute(deployment: Deployment, statement: str) -> None:
    with connect(deployment.url) as conn:
        assert conn.execute(statement).rowcount > 0


def manifest(deployment: Deployment, layer: str) -> Manifest:
    manifest = deployment.store.manifest(layer, "Patient", KEY)
    assert manifest
    return manifest


def test_a_page_that_the_server_leaves_out_fails_reconciliation(server: SandboxServer, deployment: Deployment) -> None:
    server.set_faults(Fault(kind=FaultKind.LOSE_PAGE, on=frozenset({RequestKind.PAGE}), times=1))
    (outcome,) = deployment.ingest(first=DAY, last=DAY + timedelta(days=1))
    assert outcome.success
    results = evaluations(deployment, outcome.run_id)
    assert set(results) == {None, KEY, NEXT}
    assert [results[key].passed for key in (None, KEY, NEXT)] == [False, False, True]
    assert (number(results[KEY], "server_total"), number(results[KEY], "matched")) == (24, 19)
    assert "the server counts 24 but returned 19" in (results[KEY].description or "")
    assert "materialize raw, validated and normalized of 2024-01-05 again" in (results[None].description or "")
    assert number(results[None], "unreconciled_windows") == 1

    again = materialize(deployment, *LAYERS, windows=[KEY])
    assert again.success
    assert run_check(deployment).passed
    assert deployment.count_loaded() == {"Patient": 30}


def test_a_page_lost_from_the_open_window_fails_reconciliation_until_the_next_load_reads_it_again(
    deploy: Deploy,
) -> None:
    now = datetime.now(UTC)
    with SandboxServer([patient(f"p{n}", now - timedelta(seconds=n)) for n in range(5, 15)]) as server:
        deployment = deploy(
            fhir_base_url=server.url, fhir_resource_types="Patient", fhir_page_size=5, fhir_partition="monthly"
        )
        server.set_faults(Fault(kind=FaultKind.LOSE_PAGE, on=frozenset({RequestKind.PAGE})))
        (outcome,) = deployment.ingest()
        assert len(deployment.unreconciled(outcome)) == 1
        server.set_faults()
        (later,) = deployment.ingest()
        assert deployment.unreconciled(later) == []
        assert run_check(deployment, later.windows.windows[0].key).passed
    assert deployment.count_loaded() == {"Patient": 10}


def test_a_total_that_differs_from_the_resources_received_is_reported(
    server: SandboxServer, deployment: Deployment
) -> None:
    server.set_faults(Fault(kind=FaultKind.WRONG_TOTAL, by=2))
    (outcome,) = deployment.ingest(first=DAY, last=DAY)
    (message,) = deployment.unreconciled(outcome)
    assert "1 of 1 windows do not reconcile: the server counts 26 but returned 24" in message
    assert deployment.count_loaded() == {"Patient": 24}


@pytest.mark.parametrize("table", ["patient", "resource"])
def test_a_row_deleted_by_hand_fails_reconciliation_and_the_next_load_restores_it(
    deployment: Deployment, table: str
) -> None:
    deployment.ingest(first=DAY, last=DAY)
    assert run_check(deployment).passed
    execute(deployment, f"DELETE FROM fhir.{table} WHERE id IN ('p3', 'p4')")
    failed = run_check(deployment)
    assert not failed.passed
    assert (number(failed, "valid"), number(failed, "loaded"), number(failed, "missing")) == (24, 22, 2)
    assert "2 valid resources are not in the tables: materialize normalized again" in (failed.description or "")
    assert materialize(deployment, "normalized/patient", "normalized/patient_name", windows=[KEY]).success
    assert run_check(deployment).passed
    assert deployment.query("SELECT count(*) FROM fhir.patient") == [(24,)]
    assert deployment.query("SELECT count(*) FROM fhir.patient_name") == [(24,)]


def test_a_row_deleted_by_hand_from_the_open_window_is_restored(deploy: Deploy) -> None:
    with SandboxServer([patient("a", datetime.now(UTC) - timedelta(seconds=5))]) as server:
        deployment = deploy(fhir_base_url=server.url, fhir_resource_types="Patient", fhir_partition="monthly")
        (outcome,) = deployment.ingest()
        key = outcome.windows.windows[0].key
        execute(deployment, "DELETE FROM fhir.patient")
        assert not run_check(deployment, key).passed
        assert materialize(deployment, "normalized/patient", windows=[key]).success
        assert run_check(deployment, key).passed


def test_a_newer_version_in_the_tables_accounts_for_an_older_one(server: SandboxServer, deployment: Deployment) -> None:
    deployment.ingest(first=DAY, last=DAY)
    server.store.seed(patient("p3", DAY + timedelta(days=1, hours=12), version="2", gender="female"), 0)
    deployment.ingest(first=DAY + timedelta(days=1), last=DAY + timedelta(days=1))
    assert run_check(deployment).passed
    assert run_check(deployment, NEXT).passed


@pytest.mark.parametrize("layer", ["raw", "validated"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_part_is_a_clear_error_and_the_tables_stay_unchanged(
    deployment: Deployment, layer: str, damage: str
) -> None:
    deployment.ingest(first=DAY, last=DAY)
    tables = deployment.tables()
    (part,) = manifest(deployment, layer).parts
    path = deployment.settings.home / "store" / part.name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:100] + bytes([content[100] ^ 0xFF]) + content[101:])
    below = "validated/patient" if layer == "raw" else "normalized/patient"
    result = materialize(deployment, below, windows=[KEY])
    assert not result.success
    ((error,),) = deployment.query("SELECT error FROM ops.ingestion_runs WHERE run_id = %s", result.run_id)
    assert part.name in error
    assert "again" in error
    assert deployment.tables() == tables
    assert materialize(deployment, *LAYERS, windows=[KEY]).success
    assert run_check(deployment).passed
