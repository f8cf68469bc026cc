"""A range run has the same events in Dagster's storage for each partition as a run of that partition."""

from datetime import UTC, datetime
from pathlib import Path

import dagster as dg

from fhir_assets.orchestration.instance.storage import BatchedEventLog
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.dagster_internals import AssetCheckExecutionRecordStatus
from fhir_assets_tests.support.deployment import Deploy

DAYS = ["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04"]


def test_every_partition_of_a_range_is_planned_materialized_and_checked(deploy: Deploy, tmp_path: Path) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    moments = [datetime(2024, 1, day, tzinfo=UTC) for day in (1, 4)]
    (folder / "Patient.ndjson").write_bytes(b"".join(patient(f"p{m.day}", m) + b"\n" for m in moments))
    deployment = deploy(
        fhir_source="ndjson",
        fhir_base_url=str(folder),
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-01",
    )
    (outcome,) = deployment.ingest()
    assert outcome.success
    log = deployment.instance.event_log_storage
    assert isinstance(log, BatchedEventLog)
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
