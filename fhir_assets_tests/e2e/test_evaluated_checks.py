"""The checks of tables read as evaluated: after loads, ticks without news, and changes of other tables."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest

from fhir_assets.definitions import build_definitions
from fhir_assets.orchestration.check_names import TABLE_CHECKS
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.content import add, encounter, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment

TYPES = ("patient", "encounter")
QUICK = {"volume"}


def just_now() -> datetime:
    return datetime.now(UTC) - timedelta(seconds=2)


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    with SandboxServer([]) as server:
        add(server, patient("p1", just_now(), gender="male"))
        add(server, encounter("e1", just_now(), "Patient/p1"), encounter("e2", just_now(), "Patient/p2"))
        yield server


@pytest.fixture
def deployment(deploy: Deploy, server: SandboxServer) -> Deployment:
    deployment = deploy(
        fhir_base_url=server.url,
        fhir_resource_types="Patient,Encounter",
        fhir_last_updated_gte=f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}",
        fhir_overlap_seconds=120,
        checks_minutes=1,
    )
    assert all(outcome.success for outcome in deployment.ingest())
    return deployment


def read_results(deployment: Deployment) -> dict[tuple[str, str], bool]:
    """Return the results that the UI shows: evaluations that are about the latest materialization of their table."""
    storage = deployment.instance.event_log_storage
    results = {}
    for table in TYPES:
        asset = dg.AssetKey(["normalized", table])
        latest = deployment.instance.fetch_materializations(asset, limit=1).records[0].storage_id
        keys = [dg.AssetCheckKey(asset, name) for name in TABLE_CHECKS]
        for key, record in storage.get_latest_asset_check_execution_by_key(keys).items():
            event = record.event.dagster_event if record.event else None
            evaluation = event.event_specific_data if event else None
            if isinstance(evaluation, dg.AssetCheckEvaluation):
                target = evaluation.target_materialization_data
                if target and target.storage_id >= latest:
                    results[table, key.name] = evaluation.passed
    return results


def evaluate_sensor(deployment: Deployment) -> list[dg.RunRequest]:
    """Return the requests of the sensor, as if the last evaluation were long ago."""
    deployment.query(
        "UPDATE runs SET start_time = start_time - 3600, end_time = end_time - 3600"
        " WHERE pipeline_name = 'check_tables' RETURNING 1"
    )
    repository = build_definitions(deployment.settings).get_repository_def()
    with dg.build_sensor_context(deployment.instance, repository_def=repository) as context:
        data = repository.get_sensor_def("check_changed_tables").evaluate_tick(context)
    return list(data.run_requests or ())


def check_changed_tables(deployment: Deployment) -> set[tuple[str, str]]:
    """Execute the request of the sensor. Return the table and name of each requested check."""
    (request,) = evaluate_sensor(deployment)
    keys = set(request.asset_check_keys or ())
    job = build_definitions(deployment.settings).resolve_job_def("check_tables")
    subset = job.get_subset(asset_selection=set(), asset_check_selection=keys)
    assert subset.execute_in_process(instance=deployment.instance).success
    return {(key.asset_key.path[-1], key.name) for key in keys}


def load_new(deployment: Deployment) -> None:
    """Load what is new, in a run of the types that have something new, as a tick does."""
    ingestion = deployment.ingestion()
    due = ingestion.due_loads.find()
    types = ingestion.due_loads.extend(due)
    for windows in due if types else ():
        assert ingestion.load(windows, refresh=Refresh.MISSING, triggered_by="test", resource_types=types).success


def test_checks_of_tables_stay_evaluated_and_a_failed_one_stays_failed_until_it_passes(
    deployment: Deployment, server: SandboxServer
) -> None:
    assert {name for _, name in read_results(deployment)} == QUICK
    check_changed_tables(deployment)
    names = TABLE_CHECKS - {"patients_known"}
    results = read_results(deployment)
    assert set(results) == {(table, name) for table in TYPES for name in names}
    assert not results["encounter", "references_resolve"]
    for _ in range(2):
        load_new(deployment)
        assert read_results(deployment) == results
        assert not evaluate_sensor(deployment)
    add(server, patient("p2", just_now(), gender="female"))
    load_new(deployment)
    outdated = {("patient", name) for name in names - QUICK}
    assert set(results) - set(read_results(deployment)) == outdated
    assert not read_results(deployment)["encounter", "references_resolve"]
    assert check_changed_tables(deployment) == outdated | {("encounter", "references_resolve")}
    results = read_results(deployment)
    assert len(results) == 2 * len(names)
    assert results["encounter", "references_resolve"]
    assert not evaluate_sensor(deployment)


def test_tables_are_not_checked_more_often_than_the_settings_say(deployment: Deployment) -> None:
    check_changed_tables(deployment)
    (outcome,) = deployment.ingest(first=just_now(), last=just_now())
    assert outcome.success
    repository = build_definitions(deployment.settings).get_repository_def()
    with dg.build_sensor_context(deployment.instance, repository_def=repository) as context:
        data = repository.get_sensor_def("check_changed_tables").evaluate_tick(context)
    assert not data.run_requests
    assert "the next evaluation" in (data.skip_message or "")
    assert evaluate_sensor(deployment)
