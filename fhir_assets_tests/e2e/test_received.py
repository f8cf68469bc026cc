"""Resources from other channels than the source are loaded into the tables by Dagster."""

from datetime import UTC, datetime, timedelta

import dagster as dg

from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.record import Record, build_record, read_header
from fhir_assets.orchestration.received_windows import build_materializations
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.deployment import Deploy, Deployment

DAY = datetime(2024, 1, 5, tzinfo=UTC)


def record(body: bytes) -> Record:
    return build_record(body, read_header(body), datetime.now(UTC))


def receiver(deployment: Deployment) -> Receiver:
    settings = deployment.settings
    return Receiver(deployment.store, Warehouse(settings).connect, settings.window_scheme, settings.fhir_resource_types)


def load(deployment: Deployment) -> list[bool]:
    ingestion = deployment.ingestion()
    outcomes = [ingestion.load_received(waiting, triggered_by="test") for waiting in ingestion.find_received()]
    assert [deployment.unreconciled(outcome) for outcome in outcomes] == [[]] * len(outcomes)
    return [outcome.success for outcome in outcomes]


def evaluate_sensor(deployment: Deployment) -> list[dg.RunRequest]:
    definitions = build_definitions(deployment.settings)
    context = dg.build_sensor_context(instance=deployment.instance, repository_def=definitions.get_repository_def())
    data = definitions.get_repository_def().get_sensor_def("load_received").evaluate_tick(context)
    return list(data.run_requests or [])


def test_received_resources_are_loaded_without_a_source_and_without_moving_a_checkpoint(deploy: Deploy) -> None:
    deployment = deploy(fhir_resource_types=("Patient", "Encounter"))
    receiver(deployment).receive([record(patient("a", DAY)), record(patient("b", DAY + timedelta(days=1)))], "api:1")
    assert load(deployment) == [True]
    assert deployment.count_loaded() == {"Patient": 2}
    assert deployment.query("SELECT * FROM ops.checkpoints") == []
    assert deployment.ingestion().find_received() == []


def test_a_fetch_of_a_window_keeps_the_resources_received_in_it(deploy: Deploy) -> None:
    with SandboxServer([patient("a", DAY)]) as server:
        deployment = deploy(fhir_base_url=server.url, fhir_resource_types=("Patient",))
        receiver(deployment).receive([record(patient("b", DAY))], "api:1")
        for refresh in (Refresh.WINDOW, Refresh.FULL):
            outcomes = deployment.ingest(first=DAY, last=DAY, refresh=refresh)
            assert [deployment.unreconciled(outcome) for outcome in outcomes] == [[]]
        assert deployment.count_loaded() == {"Patient": 2}
        assert deployment.ingestion().find_received() == []
        receiver(deployment).receive([record(patient("c", DAY))], "api:2")
        assert load(deployment) == [True]
        assert deployment.count_loaded() == {"Patient": 3}


def test_the_sensor_requests_the_waiting_types_and_windows_once(deploy: Deploy) -> None:
    deployment = deploy(fhir_resource_types=("Patient", "Encounter"))
    days = (0, 1, 5)
    receiver(deployment).receive([record(patient(f"p{n}", DAY + timedelta(days=n))) for n in days], "api:1")
    first, second = evaluate_sensor(deployment)
    assert first.tags["dagster/asset_partition_range_start"] == "2024-01-05"
    assert first.tags["dagster/asset_partition_range_end"] == "2024-01-06"
    assert second.partition_key == "2024-01-10"
    keys = {key.to_user_string() for key in second.asset_selection or ()}
    assert {"validated/patient", "normalized/patient"} <= keys
    assert not any("encounter" in key for key in keys)
    assert evaluate_sensor(deployment) == []
    assert load(deployment) == [True, True]
    assert deployment.count_loaded() == {"Patient": 3}


def test_a_receipt_is_reported_as_a_materialization_of_raw(deploy: Deploy) -> None:
    deployment = deploy(fhir_resource_types=("Patient",))
    receipt = receiver(deployment).receive([record(patient("a", DAY))], "api:1")
    for event in build_materializations(receipt):
        deployment.instance.report_runless_asset_event(event)
    keys = deployment.instance.get_materialized_partitions(dg.AssetKey(["raw", "patient"]))
    assert keys == {"2024-01-05"}


def test_resources_received_under_other_settings_wait_and_do_not_block_others(deploy: Deploy) -> None:
    before = deploy(fhir_resource_types=("Patient", "Encounter"), fhir_partition="hourly")
    receiver(before).receive([record(patient("a", DAY))], "api:1")
    deployment = deploy(fhir_resource_types=("Patient",), fhir_last_updated_gte=DAY)
    receiver(deployment).receive([record(patient("b", DAY))], "api:2")
    encounters = b'{"resourceType":"Encounter","id":"e","meta":{"lastUpdated":"2024-01-05T00:00:00Z"}}'
    receiver(before).receive([record(encounters)], "api:3")
    (request,) = evaluate_sensor(deployment)
    assert request.partition_key == "2024-01-05"
    assert load(deployment) == [True]
    assert deployment.query("SELECT origin FROM ops.received WHERE loaded_at IS NULL ORDER BY 1") == [
        ("api:1",),
        ("api:3",),
    ]
    assert deployment.ingestion().find_received() == []
