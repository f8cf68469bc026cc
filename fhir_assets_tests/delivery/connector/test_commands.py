"""`fhir-assets connector` as somebody at a terminal uses it, and the same seen from Dagster."""

import json
from pathlib import Path

import dagster as dg
import pytest
from typer.testing import CliRunner

from fhir_assets.cli.connector import app
from fhir_assets.delivery.connector import progress
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.orchestration.assets.delivered_health import KEY, build_health_patient
from fhir_assets.warehouse.postgres.db.schema_state import sql_folder
from fhir_assets_tests.support.hospital import Hospital


@pytest.fixture
def environment(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> Hospital:
    monkeypatch.chdir(hospital.settings.home)
    monkeypatch.setenv("DB_URL", hospital.url)
    monkeypatch.setenv("FHIR_BASE_URL", hospital.server.url)
    monkeypatch.setenv("FHIR_ASSETS_HOME", str(hospital.settings.home))
    return hospital


def call(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_commands_fail_until_the_outbox_is_installed(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_URL", database)
    with pytest.raises(ConfigurationError, match="connector install"):
        CliRunner().invoke(app, ["status"], catch_exceptions=False)
    call("install")
    assert json.loads(call("status", "--json"))["unprocessed"] == 0


def test_an_outbox_of_an_earlier_release_is_upgraded_by_installing_again(environment: Hospital) -> None:
    environment.admit("1")
    environment.deliver()
    environment.execute("UPDATE health.fhir_delivered SET identifier_value = '1 '")
    environment.execute("DROP TABLE health.fhir_sent")
    for column in ("server", "version_id", "sent_hash", "stored_hash"):
        environment.execute(f"ALTER TABLE health.fhir_delivered DROP COLUMN {column}")
    with pytest.raises(ConfigurationError, match="connector install"):
        CliRunner().invoke(app, ["run", "--until-empty"], catch_exceptions=False)
    call("install")
    assert environment.execute("SELECT identifier_value, sent_hash FROM health.fhir_delivered") == [("1", None)]
    environment.execute("DELETE FROM health.patient")
    environment.deliver()
    assert environment.patients() == {}


def test_dead_changes_are_listed_replayed_and_discarded(environment: Hospital) -> None:
    for _ in range(2):
        environment.admit(None)
    environment.deliver()
    dead = json.loads(call("dlq", "list", "--json"))
    assert [dead_letter["reason"] for dead_letter in dead] == ["no-identifier"] * 2
    call("dlq", "discard", str(dead[0]["id"]))
    environment.execute("UPDATE health.patient SET identifier_system = 's', identifier_value = 'late-' || id")
    environment.execute("DELETE FROM health.fhir_outbox")
    call("dlq", "replay", "--all")
    environment.deliver()
    assert json.loads(call("dlq", "list", "--json")) == []
    dead_letters = json.loads(call("dlq", "list", "--status", "all", "--json"))
    assert sorted(dead_letter["status"] for dead_letter in dead_letters) == ["discarded", "replayed"]
    with pytest.raises(ConfigurationError, match="not open dead letters"):
        CliRunner().invoke(app, ["dlq", "discard", str(dead[0]["id"])], catch_exceptions=False)
    with pytest.raises(ConfigurationError, match="select changes"):
        CliRunner().invoke(app, ["dlq", "replay"], catch_exceptions=False)


def test_the_status_command_fails_when_the_lag_is_too_long(environment: Hospital) -> None:
    environment.admit("1")
    assert CliRunner().invoke(app, ["status"]).exit_code == 0
    environment.execute("UPDATE health.fhir_outbox SET created_at = created_at - interval '1 hour'")
    assert CliRunner().invoke(app, ["status"]).exit_code == 1


def test_the_sample_events_are_delivered_as_documented(environment: Hospital) -> None:
    script = (sql_folder() / "test_events.sql").read_bytes()
    for _ in range(2):
        with environment.connect() as conn:
            conn.autocommit = True
            for statement in script.split(b";\n"):
                if statement.strip():
                    conn.execute(statement)
        environment.deliver()
    assert environment.patients() == {}
    assert [reason for _, reason in environment.dead()] == ["no-identifier"] * 2


def test_the_sensor_reports_delivered_changes_and_a_late_outbox(hospital: Hospital, tmp_path: Path) -> None:
    definitions = build_health_patient(hospital.settings, Warehouse(hospital.settings))
    dg.Definitions.validate_loadable(definitions)
    sensor = definitions.resolve_sensor_def("delivered_health_patient")
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:

        def tick(cursor: str | None) -> dg.SensorResult:
            with dg.build_sensor_context(instance=instance, cursor=cursor) as context:
                result = sensor(context)
            assert isinstance(result, dg.SensorResult)
            return result

        first = tick(None)
        assert [type(event) for event in first.asset_events] == [dg.AssetCheckEvaluation]
        hospital.admit("1")
        hospital.admit("2")
        hospital.deliver()
        hospital.execute("UPDATE health.fhir_processed_event SET processed_at = processed_at - interval '2 seconds'")
        before = json.dumps({**json.loads(first.cursor or ""), "until": "2024-01-01T00:00:00+00:00"})
        second = tick(before)
        [materialization, check] = second.asset_events
        assert isinstance(materialization, dg.AssetMaterialization)
        assert materialization.asset_key == KEY
        assert materialization.metadata["changes"].value == 2
        assert isinstance(check, dg.AssetCheckEvaluation)
        assert check.passed
        assert tick(second.cursor).asset_events == []
        hospital.admit("3")
        hospital.execute("UPDATE health.fhir_outbox SET created_at = created_at - interval '1 hour'")
        [late] = tick(second.cursor).asset_events
        assert isinstance(late, dg.AssetCheckEvaluation)
        assert not late.passed
        assert "connector run" in (late.description or "")


def test_each_delivered_change_is_counted_exactly_once(hospital: Hospital) -> None:
    with hospital.connect() as conn:
        start = progress.count_since(conn, "patient", None)
        assert start.changes == 0
        for n in range(3):
            conn.execute(
                "INSERT INTO health.fhir_processed_event (source, record_id, txid, outcome, attempts, processed_at)"
                " VALUES ('patient', %s, '5', 'created', 1, %s::timestamptz + %s * interval '1 microsecond')",
                [str(n), start.until, n],
            )
        assert progress.count_since(conn, "patient", start.until).until > start.until
        counted = 0
        moment = start.until
        while counted < 3:
            step = progress.count_since(conn, "patient", moment)
            counted, moment = counted + step.changes, step.until
        assert counted == 3
