"""Posted lists of visits: the CSV file in the landing zone, the response and the task."""

import csv
import os
from pathlib import Path

import boto3
import pytest
from psycopg import sql
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.deployment.landing import build_landing_step
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError, StoreError
from fhir_assets.privacy.keys import new_key
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.api import Api, Serve
from fhir_assets_tests.support.visits import visit


def files(api: Api) -> list[Path]:
    return sorted(Path(api.settings.fhir_landing_url).glob("*.csv"))


def receive(api: Api) -> None:
    landing = build_landing_step(api.settings, Warehouse(api.settings))
    assert landing.scan() == len(files(api))
    landing.run("run")


@pytest.fixture
def api(serve_in_threads: Serve) -> Api:
    return serve_in_threads()


def test_a_list_becomes_a_csv_file_that_is_complete_at_once(api: Api) -> None:
    rows = [visit("1", "V1", '=cmd|"x"'), visit("2", "V2", reason="two\nlines")]
    answer = api.post("/ingest", json=rows, role="ingester")
    assert answer.status_code == 202, answer.text
    content = answer.json()
    assert (content["records_received"], content["records_rejected"], content["rejected"]) == (2, 0, [])
    (path,) = files(api)
    assert path.name == content["csv_filename"]
    with path.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert written[0]["last_name"] == '\'=cmd|"x"'
    assert written[1] == rows[1]
    assert not list(path.parent.glob(".*"))
    task = f"/ingest/tasks/{content['task_id']}"
    assert api.get(task, role="ingester").json()["status"] == "waiting"
    receive(api)
    state = api.get(task, role="operator").json()
    assert (state["status"], state["dead_letters"], state["run_id"], state["error"]) == ("received", 0, "run", None)
    assert state["counts"] == {
        "patients": 2, "updates": 0, "outdated": 0, "visits": 2, "repeats": 0, "conflicts": 0
    }  # fmt: skip
    assert api.settings.db_url
    with connect(api.settings.db_url.get_secret_value()) as conn:
        conn.execute("UPDATE ops.received SET loaded_at = now()")
    assert api.get(task).json()["status"] == "loaded"
    assert api.get("/ingest/tasks/other").status_code == 404
    assert api.get(task, role="reader").status_code == 403


def test_invalid_records_are_listed_with_all_errors_and_the_others_are_accepted(api: Api) -> None:
    wrong = {**visit("", "V1", " Lovelace"), "birth_date": "1815-13-10", "shoe_size": 7}
    answer = api.post("/ingest", json=[visit("1", "V1"), wrong, "text", {"mrn": 5}])
    assert answer.status_code == 202
    content = answer.json()
    assert (content["records_received"], content["records_rejected"]) == (4, 3)
    first, text, other = content["rejected"]
    assert [record["index"] for record in content["rejected"]] == [1, 2, 3]
    assert {e["path"] for e in first["errors"]} == {"", "/mrn", "/last_name", "/birth_date"}
    assert text["errors"] == [{"path": "", "message": "must be of type object"}]
    assert len(other["errors"]) == 6
    assert not any(word in answer.text for word in ("Lovelace", "1815", "shoe"))
    receive(api)
    assert api.get(f"/ingest/tasks/{content['task_id']}").json()["counts"]["visits"] == 1


def test_a_list_without_a_valid_visit_is_refused_and_writes_no_file(api: Api) -> None:
    answer = api.post("/ingest", json=[{"mrn": ""}, 1])
    assert answer.status_code == 422
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert {error["path"] for error in answer.json()["errors"]} == {"/0", "/0/mrn", "/1"}
    for body in (b"", b"{", b"[]", b"{}", b"null", b"\xff", b"[" * 9999):
        assert api.post("/ingest", data=body).status_code == 400
    assert files(api) == []


def test_a_repeated_list_loads_nothing_and_its_task_is_known_before(api: Api) -> None:
    rows = [visit("1", "V1")]
    tasks = [api.post("/ingest", json=rows).json()["task_id"] for _ in range(2)]
    receive(api)
    first, second = (api.get(f"/ingest/tasks/{task}").json() for task in tasks)
    assert (first["known_before"], first["counts"]["visits"]) == (False, 1)
    assert (second["known_before"], second["counts"]["visits"]) == (True, 0)


def test_a_repeated_request_with_the_same_key_writes_one_file(api: Api) -> None:
    answers = [api.post("/ingest", json=[visit("1", "V1")], headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert answers[0].content == answers[1].content
    assert answers[1].headers["Idempotent-Replayed"] == "true"
    assert len(files(api)) == 1


def test_more_than_the_limits_is_413(serve_in_threads: Serve) -> None:
    api = serve_in_threads(api_max_records=2, api_max_body_bytes=2048)
    assert api.post("/ingest", json=[visit("1", f"V{n}") for n in range(3)]).json()["max_records"] == 2
    assert api.post("/ingest", data=b" " * 4096).json()["max_bytes"] == 2048
    assert files(api) == []


def test_without_a_landing_zone_the_error_names_the_missing_setting(serve_in_threads: Serve) -> None:
    for settings, missing_setting in (
        ({"fhir_landing_url": ""}, "FHIR_LANDING_URL"),
        ({"fhir_resource_types": "Patient"}, "FHIR_RESOURCE_TYPES lacks Encounter"),
    ):
        answer = serve_in_threads(**settings).post("/ingest", json=[visit("1", "V1")])
        assert answer.status_code == 503
        assert missing_setting in answer.json()["detail"]


def test_an_unwritable_landing_zone_is_503_and_creates_no_task(serve_in_threads: Serve, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    api = serve_in_threads(fhir_landing_url=str(tmp_path / "file" / "zone"))
    answer = api.post("/ingest", json=[visit("1", "V1")])
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert api.settings.db_url
    with connect(api.settings.db_url.get_secret_value()) as conn:
        assert conn.execute("SELECT FROM ops.visit_posts").fetchall() == []


def test_the_landing_zone_can_be_a_bucket(serve_in_threads: Serve, s3_url: str) -> None:
    api = serve_in_threads(fhir_landing_url=s3_url)
    name = api.post("/ingest", json=[visit("1", "V1")]).json()["csv_filename"]
    bucket, prefix = s3_url.removeprefix("s3://").split("/", 1)
    content = boto3.client("s3").get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"].read()
    assert content.startswith(b"mrn,first_name,")
    landing = build_landing_step(api.settings, Warehouse(api.settings))
    assert landing.scan() == 1
    assert landing.run("run").rows == 2


def test_a_request_is_audited_and_logs_tables_and_file_names_contain_no_patient_data(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    api.post("/ingest", json=[visit("SECRET-1", "SECRET-2", "Secretname")], role="ingester")
    receive(api)
    assert api.settings.db_url
    with connect(api.settings.db_url.get_secret_value()) as conn:
        audit_records = conn.execute("SELECT action, actor, resource_type, count FROM ops.audit_log").fetchall()
        tables = conn.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'ops'").fetchall()
        rows = [conn.execute(sql.SQL("SELECT t::text FROM ops.{} t").format(sql.Identifier(t))).fetchall()
                for (t,) in tables]  # fmt: skip
    assert ("create", "api:ingester", "Encounter", 1) in audit_records
    written_text = str(rows) + caplog.text + str(os.listdir(api.settings.fhir_landing_url))
    assert "a request was answered" in written_text
    assert "SECRET" not in written_text
    assert "Secret" not in written_text


def test_values_that_a_spreadsheet_damaged_are_rejected_by_name(api: Api) -> None:
    damaged = [
        ("mrn", "1.23457E+11"),
        ("visit_account_number", "#N/A"),
        ("birth_date", "2024-02-01"),
        ("mrn", "12\u200b3"),
    ]
    answer = api.post("/ingest", json=[{**visit("M1", "V1"), column: value} for column, value in damaged])
    assert answer.status_code == 422
    assert [error["path"] for error in answer.json()["errors"]] == [
        f"/{n}/{name}" for n, (name, _) in enumerate(damaged)
    ]
    assert not any(value in answer.text for _, value in damaged)


def test_with_keys_the_name_of_a_posted_file_says_that_it_is_encrypted_and_landing_cat_prints_it(
    serve_in_threads: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = serve_in_threads(phi_encryption_keys=new_key())
    settings = api.settings
    answer = api.post("/ingest", json=[visit("1", "V1", "Canary")], role="ingester")
    name = answer.json()["csv_filename"]
    assert name.endswith(".csv.encrypted")
    file = Path(settings.fhir_landing_url, name)
    assert b"Canary" not in file.read_bytes()
    assert settings.db_url
    assert settings.phi_encryption_keys
    for variable, value in {
        "DB_URL": settings.db_url.get_secret_value(),
        "FHIR_ASSETS_HOME": str(settings.home),
        "FHIR_LANDING_URL": settings.fhir_landing_url,
        "PHI_ENCRYPTION_KEYS": settings.phi_encryption_keys.get_secret_value(),
    }.items():
        monkeypatch.setenv(variable, value)
    assert "Canary" in CliRunner().invoke(app, ["landing", "cat", name], catch_exceptions=False).stdout
    with pytest.raises(ConfigurationError, match="no file of this name"):
        CliRunner().invoke(app, ["landing", "cat", "../landing"], catch_exceptions=False)
    with connect(settings.db_url.get_secret_value()) as conn:
        assert conn.execute("SELECT count(*) FROM ops.audit_log WHERE action = 'decrypt'").fetchall() == [(1,)]
    landing = build_landing_step(settings, Warehouse(settings))
    landing.scan()
    landing.run("run")
    task = api.get(f"/ingest/tasks/{answer.json()['task_id']}", role="ingester").json()
    assert (task["status"], task["counts"]["visits"]) == ("received", 1)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(StoreError, match="is truncated"):
        CliRunner().invoke(app, ["landing", "cat", name], catch_exceptions=False)
