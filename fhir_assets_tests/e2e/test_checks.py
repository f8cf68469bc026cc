"""The checks other than `reconciles`: the condition that makes each fail, its message, and its result by window."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import pytest

from fhir_assets.definitions import build_definitions
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.privacy.keys import new_key
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.ops import checkpoints
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import add, encounter, materialize, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.search_server import SearchServer

DAY = datetime(2024, 1, 5, tzinfo=UTC)
SECRET = "Wintergarten"


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    """A server with three days of data: 10 patients and one encounter a day; 2 patients of day 2 have a bad gender."""
    with SandboxServer([]) as server:
        for day in range(3):
            moment = DAY + timedelta(days=day)
            for n in range(10):
                gender = SECRET if day == 1 and n < 2 else "male"
                add(server, patient(f"p{day}-{n}", moment + timedelta(hours=n), gender=gender))
            add(server, encounter(f"e{day}", moment, f"Patient/p{day}-0"))
        yield server


@pytest.fixture
def deployment(deploy: Deploy, server: SandboxServer) -> Deployment:
    return deploy(
        fhir_base_url=server.url,
        fhir_resource_types="Patient,Encounter",
        fhir_last_updated_gte="2024-01-01",
        dead_letter_warn_rate=0.05,
        dead_letter_error_rate=0.15,
    )


def evaluate_windows(deployment: Deployment, run_id: str, name: str) -> dict[str | None, dg.AssetCheckEvaluation]:
    """Return the evaluations of a check of table patient in a run, by partition key."""
    return {
        evaluation.partition: evaluation
        for evaluation in deployment.checks(run_id, name)
        if evaluation.asset_key.path[-1] == "patient"
    }


def evaluate_tables(deployment: Deployment) -> dict[tuple[str, str], dg.AssetCheckEvaluation]:
    """Return the evaluations of the job check_tables, by table and check."""
    job = build_definitions(deployment.settings).resolve_job_def("check_tables")
    result = job.execute_in_process(instance=deployment.instance)
    assert result.success
    return {
        (evaluation.asset_key.path[-1], evaluation.check_name): evaluation
        for evaluation in result.get_asset_check_evaluations()
    }


def rows(evaluation: dg.AssetCheckEvaluation, name: str) -> list[dict[str, Any]]:
    value = evaluation.metadata[name]
    assert isinstance(value, dg.TableMetadataValue)
    return [dict(record.data) for record in value.records]


def test_the_dead_letter_rate_is_checked_for_each_window_of_a_range_and_for_one_window(deployment: Deployment) -> None:
    (outcome,) = deployment.ingest(first=DAY, last=DAY + timedelta(days=2))
    evaluations = evaluate_windows(deployment, outcome.run_id, "dead_letter_rate")
    assert {key: evaluation.passed for key, evaluation in evaluations.items()} == {
        None: False,
        "2024-01-05": True,
        "2024-01-06": False,
        "2024-01-07": True,
    }
    assert evaluations[None].severity is dg.AssetCheckSeverity.WARN
    failed = evaluations["2024-01-06"]
    assert failed.severity is dg.AssetCheckSeverity.ERROR
    (rule,) = rows(failed, "by_rule")
    assert (rule["rule"], rule["path"], rule["dead_letters"]) == ("required-binding", "Patient.gender", 2)
    description = failed.description or ""
    assert "2 of 10 resources (20.00%)" in description
    assert "`fhir-assets dead-letters replay --type Patient --window 2024-01-06`" in description
    assert SECRET not in repr(evaluations)

    (single,) = deployment.ingest(first=DAY + timedelta(days=1), last=DAY + timedelta(days=1))
    assert not evaluate_windows(deployment, single.run_id, "dead_letter_rate")["2024-01-06"].passed


def read_statuses(deployment: Deployment, name: str) -> dict[str, str]:
    """Return the status that the UI shows for each window of a check of table patient, without missing ones."""
    definitions = build_definitions(deployment.settings)
    asset = dg.AssetKey(["normalized", "patient"])
    partitions = definitions.resolve_assets_def(asset).partitions_def
    key = dg.AssetCheckKey(asset, name)
    state = deployment.instance.event_log_storage.get_asset_check_state([(key, partitions)])[key]
    statuses: dict[str, str] = {}
    for status, subset in state.subsets.items():
        for window in subset.subset_value.get_partition_keys():
            assert window not in statuses
            statuses[window] = status.value
    return statuses


def test_a_window_that_failed_in_a_range_stays_failed_after_a_later_load_and_until_it_passes(
    deployment: Deployment, server: SandboxServer
) -> None:
    deployment.ingest(first=DAY, last=DAY + timedelta(days=2))
    expected = {"2024-01-05": "SUCCEEDED", "2024-01-06": "FAILED", "2024-01-07": "SUCCEEDED"}
    assert read_statuses(deployment, "dead_letter_rate") == expected
    assert set(read_statuses(deployment, "reconciles").values()) == {"SUCCEEDED"}
    deployment.ingest(first=DAY + timedelta(days=2), last=DAY + timedelta(days=3))
    assert read_statuses(deployment, "dead_letter_rate") == {**expected, "2024-01-08": "SUCCEEDED"}
    add(server, *(patient(f"p1-{n}", DAY + timedelta(days=3, hours=n), gender="male") for n in range(2)))
    deployment.ingest(first=DAY + timedelta(days=3), last=DAY + timedelta(days=3), refresh=Refresh.FULL)
    assert set(read_statuses(deployment, "dead_letter_rate").values()) == {"SUCCEEDED"}


def execute_all(deployment: Deployment) -> dict[tuple[str | None, str], dg.AssetCheckEvaluation]:
    """Execute all checks of table patient together, as the button of the UI does. Return them by window and name."""
    definitions = build_definitions(deployment.settings)
    keys = {
        key
        for key in definitions.resolve_asset_graph().asset_check_keys
        if key.asset_key == dg.AssetKey(["normalized", "patient"])
    }
    job = definitions.resolve_implicit_global_asset_job_def()
    result = job.get_subset(asset_selection=set(), asset_check_selection=keys).execute_in_process(
        instance=deployment.instance
    )
    assert result.success
    return {(evaluation.partition, evaluation.check_name): evaluation for evaluation in deployment_checks(result)}


def deployment_checks(result: dg.ExecuteInProcessResult) -> list[dg.AssetCheckEvaluation]:
    events = (event.event_specific_data for event in result.all_events)
    return [data for data in events if isinstance(data, dg.AssetCheckEvaluation)]


def test_all_checks_of_a_table_executed_together_evaluate_every_window(deployment: Deployment) -> None:
    deployment.ingest(first=DAY, last=DAY + timedelta(days=2))
    with connect(deployment.url) as conn:
        conn.execute("DELETE FROM fhir.resource WHERE id = 'p0-3'")
    evaluations = execute_all(deployment)
    assert {name for key, name in evaluations if key is None} >= {"reconciles", "dead_letter_rate", "no_duplicates"}
    assert not evaluations[None, "reconciles"].passed
    assert read_statuses(deployment, "reconciles") == {
        "2024-01-05": "FAILED",
        "2024-01-06": "SUCCEEDED",
        "2024-01-07": "SUCCEEDED",
    }
    assert read_statuses(deployment, "dead_letter_rate")["2024-01-06"] == "FAILED"
    assert not deployment.query("SELECT FROM ops.ingestion_runs WHERE status = 'FAILED'")
    deployment.ingest(first=DAY, last=DAY, refresh=Refresh.FULL)
    execute_all(deployment)
    assert set(read_statuses(deployment, "reconciles").values()) == {"SUCCEEDED"}


def test_the_volume_check_warns_of_a_window_unlike_the_windows_before_it(deploy: Deploy) -> None:
    now = datetime.now(UTC)
    with SandboxServer([]) as server:
        deployment = deploy(fhir_base_url=server.url, fhir_resource_types="Patient", fhir_last_updated_gte="2024-01-01")
        for day in range(1, 9):
            patients_of_day = 90 if day == 2 else 10
            add(
                server,
                *(patient(f"p{day}-{n}", now - timedelta(days=day), gender="male") for n in range(patients_of_day)),
            )
        deployment.ingest()
        volume = evaluate_tables(deployment)["patient", "volume"]
    fresh = evaluate_tables(deployment)["patient", "fresh"]
    assert not fresh.passed
    assert "connection refused" in (fresh.description or "")
    assert not volume.passed
    assert volume.severity is dg.AssetCheckSeverity.WARN
    unusual = (now - timedelta(days=2)).strftime("%Y-%m-%d")
    assert f"{unusual} has 90 resources; the windows before it have 10 to 10" in (volume.description or "")
    assert [row["window"] for row in rows(volume, "by_window")] == [unusual]


def test_each_table_check_fails_for_its_own_reason(server: SandboxServer, deployment: Deployment) -> None:
    assert {key: evaluation.passed for key, evaluation in evaluate_tables(deployment).items()} == {
        (table, name): name != "fresh"
        for table in ("patient", "encounter")
        for name in (
            *("fresh", "schema_matches", "no_duplicates", "references_resolve"),
            *("no_failed_partitions", "no_plaintext_phi", "volume"),
        )
    }
    deployment.ingest(first=DAY, last=DAY + timedelta(days=2))
    evaluations = evaluate_tables(deployment)
    assert {key for key, evaluation in evaluations.items() if not evaluation.passed} == {
        ("patient", "fresh"),
        ("encounter", "fresh"),
        ("encounter", "references_resolve"),
    }
    with connect(deployment.url) as conn:
        checkpoints.begin(conn, ["Patient"], DAY, source_state=None)
        checkpoints.begin(conn, ["Encounter"], datetime.now(UTC), source_state=None)
    missing = evaluations["encounter", "references_resolve"]
    assert missing.severity is dg.AssetCheckSeverity.WARN
    assert rows(missing, "by_target") == [{"target": "Patient", "references": 3, "missing": 1, "share": "33.33%"}]

    with connect(deployment.url) as conn:
        conn.execute("ALTER TABLE fhir.patient DROP CONSTRAINT patient_pkey")
        conn.execute("INSERT INTO fhir.patient SELECT * FROM fhir.patient WHERE id = 'p0-1'")
        conn.execute("ALTER TABLE fhir.patient_name DROP COLUMN family")
    evaluations = evaluate_tables(deployment)
    assert {key for key, evaluation in evaluations.items() if not evaluation.passed} == {
        ("patient", "fresh"),
        ("patient", "schema_matches"),
        ("patient", "no_duplicates"),
        ("encounter", "references_resolve"),
    }
    assert "is expected" in (evaluations["patient", "fresh"].description or "")
    assert "migrate --apply-view-changes" in (evaluations["patient", "schema_matches"].description or "")


def test_a_load_evaluates_the_checks_of_its_windows_only(deployment: Deployment) -> None:
    (outcome,) = deployment.ingest(first=DAY, last=DAY)
    assert deployment.checks(outcome.run_id, "reconciles")
    assert deployment.checks(outcome.run_id, "dead_letter_rate")
    assert not deployment.checks(outcome.run_id, "no_duplicates")


def test_a_table_has_fewer_than_ten_checks(deployment: Deployment) -> None:
    graph = build_definitions(deployment.settings).resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        assert len(graph.get_check_keys_for_assets({key})) < 10


def test_all_assets_of_a_range_can_be_materialized_at_once_with_every_check(deployment: Deployment) -> None:
    job = build_definitions(deployment.settings).resolve_implicit_global_asset_job_def()
    tags = {"dagster/asset_partition_range_start": "2024-01-05", "dagster/asset_partition_range_end": "2024-01-07"}
    keys = {key for key in job.asset_layer.executable_asset_keys if key.path[0] in ("raw", "validated", "normalized")}
    checks = {key for key in job.asset_layer.asset_graph.asset_check_keys if key.asset_key in keys}
    result = job.get_subset(asset_selection=keys, asset_check_selection=checks).execute_in_process(
        instance=deployment.instance, tags=tags, raise_on_error=False
    )
    assert result.success
    assert deployment.checks(result.run_id, "no_duplicates")
    assert len(evaluate_windows(deployment, result.run_id, "reconciles")) == 4


def test_with_keys_a_name_stored_as_plain_text_fails_the_check(deploy: Deploy, server: SandboxServer) -> None:
    deployment = deploy(
        fhir_base_url=server.url,
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-05",
        phi_encryption_keys=new_key(),
    )
    deployment.ingest(first=DAY, last=DAY)
    passed = evaluate_tables(deployment)["patient", "no_plaintext_phi"]
    assert passed.passed
    assert passed.metadata["sampled"] == dg.IntMetadataValue(10)
    with connect(deployment.url) as conn:
        conn.execute("UPDATE fhir.patient SET family = %s WHERE id = 'p0-3'", [SECRET])
    failed = evaluate_tables(deployment)["patient", "no_plaintext_phi"]
    assert not failed.passed
    assert rows(failed, "by_column") == [
        {"table": "patient", "column": "family", "values": 1, "not_encrypted": 1},
    ]
    assert "keys rotate" in str(failed.description)
    assert SECRET not in str(failed)


def read_metadata(deployment: Deployment, asset: str) -> dict[str, dict[str, Any]]:
    """Return the metadata of the latest materialization of each window, by partition key."""
    records = deployment.instance.fetch_materializations(dg.AssetKey(asset.split("/")), limit=100).records
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        assert record.partition_key
        assert record.asset_materialization
        metadata = {name: value.value for name, value in record.asset_materialization.metadata.items()}
        found.setdefault(record.partition_key, metadata)
    return found


def test_the_metadata_of_a_window_counts_this_window_only(deployment: Deployment, server: SandboxServer) -> None:
    days = [f"2024-01-0{day}" for day in (5, 6, 7, 8)]
    deployment.ingest(first=DAY, last=DAY + timedelta(days=3))

    def read(asset: str, name: str) -> list[object]:
        metadata = read_metadata(deployment, asset)
        return [metadata[day].get(name) for day in days]

    assert read("raw/patient", "dagster/partition_row_count") == [10, 10, 10, 0]
    assert read("raw/patient", "dagster/row_count") == [None, None, None, 30], "of all partitions, once"
    assert read("validated/patient", "dagster/row_count") == [None, None, None, 28]
    assert read("raw/patient", "fetched") == [10, 10, 10, 0]
    assert read("validated/patient", "dagster/partition_row_count") == [10, 8, 10, 0]
    assert read("validated/patient", "dead") == [0, 2, 0, 0]
    assert read("normalized/patient", "dagster/partition_row_count") == [10, 8, 10, 0]
    assert read("normalized/patient", "loaded") == [10, 8, 10, 0]
    assert read("normalized/patient", "dead") == [0, 2, 0, 0]
    assert read("normalized/patient", "dagster/row_count") == [None, None, None, 28], "the table's, once"
    for metadata in read_metadata(deployment, "normalized/patient").values():
        assert not any(name.startswith("run_") and name != "run_rows_written" for name in metadata)
    assert read("normalized/encounter", "dagster/partition_row_count") == [1, 1, 1, 0]
    deployment.ingest(first=DAY, last=DAY)
    assert read("normalized/patient", "dagster/partition_row_count") == [10, 8, 10, 0]


def test_the_row_count_includes_partitions_whose_number_is_not_recorded(
    deployment: Deployment, server: SandboxServer
) -> None:
    deployment.ingest(first=DAY, last=DAY + timedelta(days=1))
    # As after an upgrade, or after a commit that was killed.
    deployment.query("UPDATE ops.partition_rows SET row_count = NULL RETURNING 1")
    third = DAY + timedelta(days=2)
    deployment.ingest(first=third, last=third)
    for asset, count in (("raw/patient", 30), ("validated/patient", 28)):
        assert read_metadata(deployment, asset)[f"{third:%Y-%m-%d}"]["dagster/row_count"] == count
    assert deployment.query("SELECT count(*) FROM ops.partition_rows WHERE row_count IS NULL") == [(0,)]


def test_a_damaged_manifest_of_another_window_leaves_the_row_count_out(
    deployment: Deployment, server: SandboxServer
) -> None:
    deployment.ingest(first=DAY, last=DAY)
    deployment.query("UPDATE ops.partition_rows SET row_count = NULL RETURNING 1")
    deployment.store.blobs.put(f"raw/patient/{DAY:%Y-%m-%d}/manifest.json", b"{")
    second = DAY + timedelta(days=1)
    assert materialize(deployment, "raw/patient", windows=[f"{second:%Y-%m-%d}"]).success
    assert "dagster/row_count" not in read_metadata(deployment, "raw/patient")[f"{second:%Y-%m-%d}"]


def read_log(deployment: Deployment, run_id: str) -> list[str]:
    """Return the lines of the steps in the log view of a run."""
    events = deployment.instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
    return [event.get_dagster_event().message or "" for event in events if event.step_key]


def test_a_step_says_in_the_log_of_its_run_what_it_did_without_patient_data(deployment: Deployment) -> None:
    (outcome,) = deployment.ingest(first=DAY, last=DAY + timedelta(days=2))
    lines = [line.rpartition(", ")[0] for line in read_log(deployment, outcome.run_id)]
    assert "Patient: 30 fetched" in lines
    assert "Patient: 28 valid, 2 dead letters" in lines
    assert any(line.startswith("Patient: 28 inserted, ") for line in lines)
    assert SECRET not in "".join(lines)
    assert "Patient: dead letters of these windows by rule: 2 required-binding" in read_log(deployment, outcome.run_id)
    (again,) = deployment.ingest(first=DAY + timedelta(days=5), last=DAY + timedelta(days=5))
    assert read_log(deployment, again.run_id) == []


def test_a_type_that_the_server_does_not_offer_is_named_in_the_log(deploy: Deploy) -> None:
    with SearchServer([], types=("Patient",)) as server:
        deployment = deploy(fhir_base_url=server.url, fhir_resource_types="Patient,Device", fhir_max_attempts=1)
        outcome = deployment.ingest()[-1]
    assert read_log(deployment, outcome.run_id) == ["Device is skipped: the source does not offer it"]
