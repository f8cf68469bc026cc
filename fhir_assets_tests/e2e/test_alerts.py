"""Incidents are reported to a real webhook: once when they begin and once when they end."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from fhir_assets.definitions import build_definitions
from fhir_assets.delivery.webhook import build_message
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.jobs import APPLY_CONSENT
from fhir_assets.orchestration.sensors import alerts
from fhir_assets.pipeline.consent.step import ConsentStep
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.ops import checkpoints, incidents
from fhir_assets.warehouse.ops.incidents import Incident
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.alerts import AlertsSensor, WebhookReceiver, receive_webhooks
from fhir_assets_tests.support.content import add, materialize, patient
from fhir_assets_tests.support.dagster_internals import record_tick
from fhir_assets_tests.support.deployment import Deploy, Deployment

pytestmark = pytest.mark.slow

DAY = datetime(2024, 1, 5, tzinfo=UTC)
SECRET = "Wintergarten"
NAME = [{"family": SECRET}]
SETTINGS = {"fhir_last_updated_gte": "2024-01-05", "fhir_resource_types": "Patient", "dead_letter_error_rate": 0.1}


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    with SandboxServer([]) as server:
        for day in range(2):
            moment = DAY + timedelta(days=day)
            add(server, *(patient(f"p{day}-{n}", moment, name=NAME) for n in range(4)))
        yield server


def deploy_with_webhook(deploy: Deploy, server: SandboxServer, hook: WebhookReceiver, **settings: object) -> Deployment:
    return deploy(
        fhir_base_url=server.url,
        fhir_last_updated_gte="2024-01-05",
        fhir_resource_types="Patient",
        alert_webhook_url=hook.url,
        dead_letter_error_rate=0.1,
        **settings,
    )


@contextmanager
def unwritable_store(deployment: Deployment) -> Iterator[None]:
    """Put a file in the place of the folder of the layer raw during the block, so that runs fail."""
    obstacle = Path(deployment.settings.store_url) / "raw"
    obstacle.parent.mkdir(parents=True, exist_ok=True)
    obstacle.touch()
    yield
    obstacle.unlink()


def test_a_failed_check_and_its_recovery_are_reported_once_each(deploy: Deploy, server: SandboxServer) -> None:
    with receive_webhooks(503, 503, 503) as hook:
        deployment = deploy_with_webhook(deploy, server, hook)
        sensor = AlertsSensor(deployment)
        add(server, *(patient(f"bad{n}", DAY, name=NAME, gender="malee") for n in range(3)))
        last = DAY + timedelta(days=1)
        deployment.ingest(first=DAY, last=last)
        assert "did not accept the message" in sensor.tick()
        assert hook.messages == []
        sensor.tick()
        sensor.tick()
        assert len(hook.messages) == 1
        began = hook.messages[0]["began"]
        assert [incident["name"] for incident in began] == ["normalized/patient:dead_letter_rate"]
        assert began[0]["partitions"] == ["2024-01-05"]
        assert "/assets/normalized/patient" in began[0]["link"]

        add(server, *(patient(f"bad{n}", DAY + timedelta(hours=1), name=NAME) for n in range(3)))
        deployment.ingest(first=DAY, last=last, refresh=Refresh.WINDOW)
        sensor.tick()
        sensor.tick()
        assert len(hook.messages) == 2
        assert hook.messages[1]["began"] == []
        assert [incident["name"] for incident in hook.messages[1]["over"]] == ["normalized/patient:dead_letter_rate"]
        assert SECRET not in hook.text


def test_a_failed_run_is_an_incident_until_the_same_windows_succeed(deploy: Deploy, server: SandboxServer) -> None:
    with receive_webhooks() as hook:
        deployment = deploy_with_webhook(deploy, server, hook)
        sensor = AlertsSensor(deployment)
        first, last = DAY, DAY + timedelta(days=1)
        with unwritable_store(deployment):
            assert not all(outcome.success for outcome in deployment.ingest(first=first, last=last))
        sensor.tick()
        [report] = hook.messages
        assert [(incident["kind"], incident["name"], incident["partition_count"]) for incident in report["began"]] == [
            ("run", "incremental_load", 2)
        ]
        deployment.ingest(first=first, last=first)
        sensor.tick()
        assert len(hook.messages) == 1, "one of the two windows still fails"
        deployment.ingest(first=first, last=last)
        sensor.tick()
        assert [incident["name"] for incident in hook.messages[1]["over"]] == ["incremental_load"]


def test_windows_behind_schedule_are_reported(deploy: Deploy, server: SandboxServer) -> None:
    with receive_webhooks() as hook:
        deployment = deploy_with_webhook(deploy, server, hook)
        with connect(deployment.url) as conn:
            checkpoints.begin(conn, ["Patient"], DAY, source_state=None)
            sensor = AlertsSensor(deployment)
            sensor.tick()
            assert hook.messages == [], "the checkpoint has just moved"
            conn.execute("UPDATE ops.checkpoints SET updated_at = now() - interval '61 minutes'")
            conn.commit()
            sensor.tick()
            checkpoints.advance(conn, "Patient", DAY, DAY + timedelta(days=1), "a run")
            conn.commit()
            sensor.tick()
            checkpoints.advance(conn, "Patient", DAY, datetime.now(UTC), "a run")
            conn.commit()
            sensor.tick()
        report, recovery = hook.messages
        assert [(incident["kind"], incident["partitions"]) for incident in report["began"]] == [("behind", ["Patient"])]
        assert [(incident["kind"], incident["name"]) for incident in recovery["over"]] == [
            ("behind", "incremental_load")
        ]


def test_a_failure_that_recovered_before_the_first_tick_is_not_reported(deploy: Deploy, server: SandboxServer) -> None:
    with receive_webhooks() as hook:
        deployment = deploy_with_webhook(deploy, server, hook)
        with unwritable_store(deployment):
            assert not all(outcome.success for outcome in deployment.ingest(first=DAY, last=DAY))
        deployment.ingest(first=DAY, last=DAY)
        AlertsSensor(deployment).tick()
        assert hook.messages == []
        assert deployment.query("SELECT name, closed_at IS NOT NULL FROM ops.incidents") == [("incremental_load", True)]


def list_open(deployment: Deployment) -> list[tuple[object, ...]]:
    return deployment.query("SELECT kind, name FROM ops.incidents WHERE closed_at IS NULL ORDER BY id")


def observations(deployment: Deployment, key: str) -> list[str]:
    records = deployment.instance.fetch_observations(dg.AssetKey(key.split("/")), limit=10).records
    return [record.asset_observation.description or "" for record in records if record.asset_observation]


@pytest.fixture
def deployment(deploy: Deploy, server: SandboxServer) -> Deployment:
    return deploy(fhir_base_url=server.url, **SETTINGS)


def test_an_incident_of_a_materialization_closes_when_a_load_succeeds_and_stands_on_its_asset(
    deployment: Deployment,
) -> None:
    sensor = AlertsSensor(deployment)
    with unwritable_store(deployment):
        assert not materialize(deployment, "raw/patient", windows=["2024-01-05"]).success
    message = sensor.tick()
    assert "Read 1 ended runs" in message
    assert "1 incidents are open: run raw/patient" in message
    assert list_open(deployment) == [("run", "raw/patient")]
    assert observations(deployment, "raw/patient") == ["incident opened: run raw/patient"]
    deployment.ingest(first=DAY, last=DAY)
    assert "No incident is open" in sensor.tick()
    assert observations(deployment, "raw/patient") == [
        "incident closed: run raw/patient",
        "incident opened: run raw/patient",
    ]


def test_an_incident_of_apply_consent_closes_when_a_load_has_applied_consent(
    deploy: Deploy, server: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(
        fhir_base_url=server.url,
        consent_policy="opt-out",
        **{**SETTINGS, "fhir_resource_types": "Patient,Consent"},
    )
    sensor = AlertsSensor(deployment)
    job = build_definitions(deployment.settings).resolve_job_def(APPLY_CONSENT)
    with monkeypatch.context() as patch:
        patch.delattr(ConsentStep, "run")
        assert not job.execute_in_process(instance=deployment.instance, raise_on_error=False).success
    for _ in range(2):  # The policy is not applied yet.
        sensor.tick()
        assert list_open(deployment) == [("run", APPLY_CONSENT)]
    assert all(outcome.success for outcome in deployment.ingest(first=DAY, last=DAY))
    sensor.tick()
    assert list_open(deployment) == []


def test_an_incident_of_a_run_of_checks_closes_when_they_are_evaluated_again(deployment: Deployment) -> None:
    deployment.ingest(first=DAY, last=DAY)
    sensor = AlertsSensor(deployment)
    sensor.tick()
    [manifest] = Path(deployment.settings.store_url).glob("raw/patient/*/manifest.json")
    content = manifest.read_bytes()
    manifest.write_bytes(b"{")
    assert not materialize(deployment, windows=["2024-01-05"]).success
    sensor.tick()
    assert list_open(deployment) == [("run", "normalized/patient")]
    manifest.write_bytes(content)
    deployment.ingest(first=DAY, last=DAY, refresh=Refresh.WINDOW)
    sensor.tick()
    assert list_open(deployment) == []


def test_an_incident_of_a_check_closes_without_a_run_after_its_dead_letters_are_discarded(
    deployment: Deployment, server: SandboxServer
) -> None:
    add(server, *(patient(f"bad{n}", DAY, name=NAME, gender="malee") for n in range(3)))
    deployment.ingest(first=DAY, last=DAY)
    sensor = AlertsSensor(deployment)
    sensor.tick()
    assert list_open(deployment) == [("check", "normalized/patient:dead_letter_rate")]
    deployment.query("UPDATE ops.dead_letters SET status = 'discarded', resolved_at = now() RETURNING id")
    sensor.tick()
    assert list_open(deployment) == []


def test_an_incident_closes_when_its_check_or_type_no_longer_exists_or_its_check_only_warns(
    deploy: Deploy, deployment: Deployment, server: SandboxServer
) -> None:
    add(server, *(patient(f"bad{n}", DAY, name=NAME, gender="malee") for n in range(3)))
    deployment.ingest(first=DAY, last=DAY)
    AlertsSensor(deployment).tick()
    with connect(deployment.url) as conn:
        incidents.record_failure(conn, "check", "normalized/encounter:fresh", [""])
        incidents.record_failure(conn, "behind", "incremental_load", ["Encounter"])
        conn.commit()
    assert len(list_open(deployment)) == 3
    AlertsSensor(deployment).tick()
    assert list_open(deployment) == [("check", "normalized/patient:dead_letter_rate")]
    changed = {"dead_letter_error_rate": 0.9, "fhir_store_url": deployment.settings.store_url}
    lenient = deploy(home="lenient", fhir_base_url=server.url, **{**SETTINGS, **changed})
    lenient.ingest(first=DAY, last=DAY, refresh=Refresh.WINDOW)
    AlertsSensor(lenient).tick()
    assert list_open(deployment) == []


def test_a_failed_tick_is_an_incident_until_the_next_tick_ends_well(deploy: Deploy, server: SandboxServer) -> None:
    with receive_webhooks() as hook:
        deployment = deploy_with_webhook(deploy, server, hook)
        sensor = AlertsSensor(deployment)
        record_tick(deployment.instance, "load_received", "SKIPPED")
        sensor.tick()
        assert hook.messages == []
        record_tick(deployment.instance, "load_received", "FAILURE")
        record_tick(deployment.instance, "load_received", "STARTED")
        sensor.tick()
        sensor.tick()
        (message,) = hook.messages
        assert "The last tick of load_received failed, so that it may start no run" in message["text"]
        record_tick(deployment.instance, "load_received", "SUCCESS")
        sensor.tick()
        assert "load_received ticks again" in hook.messages[1]["text"]
    assert list_open(deployment) == []


def test_a_tick_that_is_ended_early_neither_loses_nor_repeats_an_event(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unwritable_store(deployment):
        deployment.ingest()
    deployment.ingest()

    class Ended(BaseException):
        """Dagster ends a tick after 60 s."""

    def end(*_: object, **__: object) -> None:
        raise Ended

    sensor = AlertsSensor(deployment)
    monkeypatch.setattr(alerts, "_record_types_behind", end)
    with pytest.raises(Ended):
        sensor.tick()
    with Warehouse(deployment.settings).connect() as conn:
        stored = incidents.get_cursor(conn)
    assert stored is not None
    assert stored.runs > 0
    monkeypatch.undo()
    opened = deployment.query("SELECT count(*) FROM ops.incidents")
    assert "Read 0 ended runs and 0 evaluations" in sensor.tick()  # although Dagster has no cursor
    assert deployment.query("SELECT count(*) FROM ops.incidents") == opened


def test_the_events_of_a_new_database_of_dagster_are_read_from_the_first_one(deployment: Deployment) -> None:
    with Warehouse(deployment.settings).connect() as conn:
        incidents.set_cursor(conn, incidents.Cursor(10**12, 10**12))
    deployment.ingest()
    assert "Read 0 ended runs" not in AlertsSensor(deployment).tick()


def test_a_long_message_names_some_incidents_and_counts_the_others() -> None:
    now = datetime.now(UTC)
    many = [
        Incident(n, "run", f"job{n}", [f"w{k}" for k in range(30)], {"windows": 30}, "r", now, None, None, None)
        for n in range(40)
    ]
    text = str(build_message(many, [], ui_url="http://ui", card=False)["text"])
    assert "and 20 more" in text
    assert "40 in all" in text
    assert "attachments" in build_message(many, [], ui_url="http://ui", card=True)
