"""A range run has the same events in Dagster's storage for each partition as a run of that partition."""

from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest

from fhir_assets.orchestration.instance.storage import BatchedEventLog
from fhir_assets.warehouse.postgres.db.connections import normalise_url
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.dagster_internals import AssetCheckExecutionRecordStatus
from fhir_assets_tests.support.deployment import Deploy, Deployment

DAYS = ["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04"]


@pytest.fixture
def deployment(deploy: Deploy, tmp_path: Path) -> Deployment:
    folder = tmp_path / "input"
    folder.mkdir()
    moments = [datetime(2024, 1, day, tzinfo=UTC) for day in (1, 4)]
    (folder / "Patient.ndjson").write_bytes(b"".join(patient(f"p{m.day}", m) + b"\n" for m in moments))
    return deploy(
        fhir_source="ndjson",
        fhir_base_url=str(folder),
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-01",
    )


def test_every_partition_of_a_range_is_planned_materialized_and_checked(deployment: Deployment) -> None:
    assert isinstance(deployment.instance.event_log_storage, BatchedEventLog)
    load_and_check(deployment)


def test_the_same_holds_with_dagsters_own_storage(
    deployment: Deployment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = {"postgres": {"postgres_url": normalise_url(deployment.url, "psycopg2")}}
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides={"storage": storage}) as instance:
        assert not isinstance(instance.event_log_storage, BatchedEventLog)
        load_and_check(Deployment(deployment.settings, instance))
    assert "Exception while storing event batch" not in capsys.readouterr().err


def load_and_check(deployment: Deployment) -> None:
    """Load the windows in one run, and read its events of each window."""
    (outcome,) = deployment.ingest()
    assert outcome.success
    log = deployment.instance.event_log_storage
    for name in ("raw/patient", "validated/patient", "normalized/patient", "normalized/patient_name"):
        key = dg.AssetKey(name.split("/"))
        assert log.get_materialized_partitions(key) == set(DAYS)
        for day in DAYS:
            planned = log.get_latest_planned_materialization_info(key, day)
            assert planned is not None
            assert planned.run_id == outcome.run_id
        (record,) = log.get_asset_records([key])
        assert record.asset_entry.last_run_id == outcome.run_id
    reconciles = dg.AssetCheckKey(dg.AssetKey(["normalized", "patient"]), "reconciles")
    statuses = {
        record.partition: record.status
        for record in log.get_asset_check_execution_history(reconciles, limit=100)
        if record.partition
    }
    assert statuses == dict.fromkeys(DAYS, AssetCheckExecutionRecordStatus.SUCCEEDED)
