"""Rows of visit files that became dead letters are listed over HTTP, corrected, and replayed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fhir_assets.api.dagster import DagsterClient
from fhir_assets.cli.main import app
from fhir_assets.deployment.landing import build_landing_step
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import CorrectionRefused
from fhir_assets.fhir.intake import visits_csv
from fhir_assets.pipeline.correct.visit_rows import read_row
from fhir_assets.warehouse.ops import dead_letters
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.api import Api, Serve
from fhir_assets_tests.support.visits import visit

RUN = "3f9a1c2b-0000-4000-8000-000000000001"


@pytest.fixture
def api(serve_in_threads: Serve, monkeypatch: pytest.MonkeyPatch) -> Api:
    api = serve_in_threads()
    settings = api.settings
    assert settings.db_url
    for name, value in {
        "DB_URL": settings.db_url.get_secret_value(),
        "FHIR_ASSETS_HOME": str(settings.home),
        "FHIR_LANDING_URL": settings.fhir_landing_url,
        "FHIR_RESOURCE_TYPES": ",".join(settings.fhir_resource_types),
    }.items():
        monkeypatch.setenv(name, value)
    return api


def receive(api: Api, run_id: str = RUN) -> None:
    landing = build_landing_step(api.settings, Warehouse(api.settings))
    landing.scan(assume_complete=True)
    landing.run(run_id)


def query(api: Api, statement: str) -> list[tuple[Any, ...]]:
    assert api.settings.db_url
    with connect(api.settings.db_url.get_secret_value()) as conn:
        return conn.execute(statement).fetchall()


def post_conflict(api: Api) -> str:
    """Post a visit, and another one with its account number. Return the task of the second."""
    assert api.post("/ingest", json=[visit("1", "V1", reason="first")], role="ingester").status_code == 202
    receive(api, "3f9a1c2b-0000-4000-8000-000000000000")
    answer = api.post("/ingest", json=[visit("1", "V1", reason="other"), visit("2", "V2")], role="ingester")
    receive(api)
    return str(answer.json()["task_id"])


def edit(dead_letter_id: int, file: Path, *arguments: str) -> Any:
    words = ["dead-letters", "edit", str(dead_letter_id), "--resource", str(file), "--json", *arguments]
    return json.loads(CliRunner().invoke(app, words, catch_exceptions=False).output)


def list_statuses(api: Api) -> list[tuple[Any, ...]]:
    return query(api, "SELECT status, attempts, resolution FROM ops.dead_letters ORDER BY id")


def list_visits(api: Api) -> int:
    ((count,),) = query(api, "SELECT count(*) FROM ops.visits")
    return int(count)


def test_a_task_lists_its_rows_and_the_run_and_the_batch_that_received_it_do_too(api: Api) -> None:
    task = api.get(f"/ingest/tasks/{post_conflict(api)}", role="ingester").json()
    assert (task["dead_letters"], task["run_id"]) == (1, RUN)
    (listed,) = task["dead_letter_list"]
    assert (listed["rule"], listed["status"], listed["run_id"]) == ("visit-conflict", "open", RUN)
    ((batch,),) = query(api, "SELECT received_as FROM ops.visit_files WHERE rejected > 0")
    assert batch.startswith("landing:batch-")
    for run in (RUN, batch):
        answer = api.get(f"/runs/{run}/deadletters", role="operator")
        assert (answer.status_code, answer.json()) == (200, {"dead_letters": [listed]}), run
    output = CliRunner().invoke(app, ["dead-letters", "list", "--run", batch, "--json"]).output
    assert [row["id"] for row in json.loads(output)] == [listed["id"]]
    assert api.get("/runs/landing:batch-none/deadletters", role="operator").json() == {"dead_letters": []}
    assert api.get("/runs/ffff/deadletters", role="operator").status_code == 404


def test_a_task_still_lists_a_row_that_later_files_have_too(api: Api) -> None:
    tasks = [post_conflict(api)]
    for number in range(2):
        rows = [visit("1", "V1", reason="other"), visit("9", f"V9{number}")]
        answer = api.post("/ingest", json=rows, role="ingester")
        receive(api, f"4f9a1c2b-0000-4000-8000-00000000000{number}")
        tasks.append(answer.json()["task_id"])
    assert len(list_statuses(api)) == 1
    for task in tasks:
        answer = api.get(f"/ingest/tasks/{task}", role="ingester").json()
        assert (answer["dead_letters"], len(answer["dead_letter_list"])) == (1, 1)
    batches = query(api, "SELECT received_as FROM ops.visit_files WHERE rejected > 0")
    assert len(batches) == len(tasks)
    for (batch,) in batches:
        assert len(api.get(f"/runs/{batch}/deadletters", role="operator").json()["dead_letters"]) == 1


@pytest.mark.parametrize("form", ["json", "csv", "row"])
def test_a_row_is_corrected_as_json_or_csv_and_received(api: Api, tmp_path: Path, form: str) -> None:
    post_conflict(api)
    corrected = visit("1", "V3", reason="other")
    file = tmp_path / "corrected"
    content = visits_csv.write([corrected])
    file.write_bytes(
        {"json": json.dumps(corrected).encode(), "csv": content, "row": content.split(b"\r\n", 1)[1]}[form]
    )
    ((number,),) = query(api, "SELECT id FROM ops.dead_letters")
    assert edit(number, file)["received"]
    assert list_statuses(api) == [("resolved", 1, "corrected")]
    assert list_visits(api) == 3


def test_a_correction_that_is_no_visit_or_contradicts_a_known_one_changes_nothing(api: Api, tmp_path: Path) -> None:
    post_conflict(api)
    ((number,),) = query(api, "SELECT id FROM ops.dead_letters")
    file = tmp_path / "corrected"
    for row, reason in (
        ({"mrn": "1"}, "not a valid visit"),
        (visit("1", "V1", reason="third"), "account number is known"),
        ([1], "rows|valid visit"),
    ):
        file.write_text(json.dumps(row))
        with pytest.raises(CorrectionRefused, match=reason):
            edit(number, file)
    assert list_statuses(api) == [("open", 1, None)]
    assert list_visits(api) == 2
    assert query(api, "SELECT count(*) FROM ops.corrections") == [(0,)]


def test_an_open_row_is_replayed_and_fails_again_until_its_cause_is_gone(api: Api) -> None:
    post_conflict(api)
    answer = api.post(f"/runs/{RUN}/replay?stage=fetch", role="operator")
    assert (answer.status_code, answer.json()["failed"], answer.json()["received"]) == (202, 1, 0)
    assert answer.json()["runs"] == [], "no run is needed, and Dagster is not there"
    assert list_statuses(api) == [("open", 2, None)]
    query(api, "DELETE FROM ops.visits RETURNING 1")
    output = CliRunner().invoke(app, ["dead-letters", "replay", "--stage", "fetch", "--no-wait", "--json"]).output
    assert json.loads(output)["resolved"] == 1
    assert list_statuses(api) == [("resolved", 2, "replayed")]
    assert list_visits(api) == 1


def test_a_replay_leaves_dead_letters_of_other_windows_and_types_open(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The windows are daily here: the first two keys are of hourly and of monthly windows of earlier settings."""
    launched: list[Any] = []

    def launch(*_: Any, assets: Any, tags: Any, **__: Any) -> str:
        launched.append((assets, tags))
        return "r"

    monkeypatch.setattr(DagsterClient, "launch", launch)
    others = [
        DeadLetter(name, None, "validate", "rule", "", "message", b"{}", key)
        for name, key in (("Patient", "2024-01-05-03:00"), ("Patient", "no-window"), ("Device", "2024-01-05"))
    ]
    with Warehouse(api.settings).connect() as conn:
        dead_letters.record(conn, RUN, others)
    assert "Device" not in api.settings.fhir_resource_types
    answer = api.post(f"/runs/{RUN}/replay", role="operator")
    assert (answer.status_code, answer.json()["marked"], answer.json()["runs"]) == (202, 0, [])
    assert (list_statuses(api), launched) == ([("open", 1, None)] * 3, [])
    with Warehouse(api.settings).connect() as conn:
        dead_letters.record(conn, RUN, [replace(others[0], partition_key="2024-01-05")])
    answer = api.post(f"/runs/{RUN}/replay", role="operator").json()
    assert (answer["marked"], answer["runs"]) == (1, ["r"])
    (assets, tags) = launched.pop()
    assert ["validated", "patient"] in [list(path) for path in assets]
    assert tags["dagster/partition"] == "2024-01-05"


def test_a_row_keeps_the_errors_of_the_file_format() -> None:
    valid = visit("1", "V1")
    assert read_row(json.dumps(valid).encode()) == read_row(visits_csv.write([valid])) == {**valid}
    with pytest.raises(CorrectionRefused, match="2 rows"):
        read_row(visits_csv.write([valid, valid]))


def test_a_landed_line_that_cannot_be_read_has_the_run_that_received_it(api: Api) -> None:
    Path(api.settings.fhir_landing_url, "p.ndjson").write_bytes(b"{broken\n")
    receive(api)
    assert query(api, "SELECT run_id, starts_with(origin, 'landing:') FROM ops.dead_letters") == [(RUN, True)]
    (listed,) = api.get(f"/runs/{RUN[:8]}/deadletters", role="operator").json()["dead_letters"]
    assert listed["stage"] == "fetch"
