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
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import CorrectionRefused
from fhir_assets.fhir.intake import visits_csv
from fhir_assets.pipeline.correct import visit_rows
from fhir_assets.pipeline.correct.visit_rows import read_row
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.ops import dead_letters, rejected_rows, replays
from fhir_assets.warehouse.ops.dead_letters import DeadLetter, Selection
from fhir_assets.warehouse.postgres.db.connections import Connection, connect
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


def post_conflicts(api: Api, count: int) -> None:
    """Post visits, and others with their account numbers; then forget the first ones."""
    for reason in ("first", "other"):
        api.post("/ingest", json=[visit("1", f"V{n}", reason=reason) for n in range(count)], role="ingester")
        receive(api)
    query(api, "DELETE FROM ops.visits RETURNING 1")


def replay_rows(api: Api) -> dict[str, Any]:
    answer: dict[str, Any] = api.post(f"/runs/{RUN}/replay?stage=fetch", role="operator").json()
    return {name: answer[name] for name in ("received", "failed", "remaining")}


def list_family_names(api: Api) -> list[str]:
    """Return the family names of the Patients in raw, in the order of their times."""
    store = build_store(api.settings)
    lines = [
        json.loads(line)
        for key in store.partition_keys("raw", "Patient")
        if (manifest := store.manifest("raw", "Patient", key))
        for batch in store.batches(manifest.parts)
        for line in batch
    ]
    return [line["name"][0]["family"] for line in sorted(lines, key=lambda line: str(line["meta"]["lastUpdated"]))]


@pytest.mark.parametrize("known_arrival", ["dead letter", "file", "first failure"])
def test_a_replayed_row_of_an_old_file_does_not_replace_newer_data(api: Api, known_arrival: str) -> None:
    for last, account, reason in (("Lovelace", "V1", "first"), ("Byron", "V1", "other"), ("King", "V2", "")):
        api.post("/ingest", json=[visit("1", account, last, reason=reason)], role="ingester")
        receive(api)
    query(api, "DELETE FROM ops.visits RETURNING 1")
    if known_arrival != "dead letter":
        query(api, "UPDATE ops.dead_letters SET arrived = NULL RETURNING 1")
    if known_arrival == "file":
        query(api, "UPDATE ops.dead_letters SET first_failure = now() + interval '1 day' RETURNING 1")
    elif known_arrival == "first failure":
        query(api, "DELETE FROM ops.landing_files RETURNING 1")
    assert replay_rows(api) == {"received": 1, "failed": 0, "remaining": 0}
    assert list_family_names(api) == ["Lovelace", "King"]
    assert list_visits(api) == 1


def test_a_correction_by_a_person_counts_as_of_now(api: Api, tmp_path: Path) -> None:
    post_conflict(api)
    api.post("/ingest", json=[visit("1", "V4", "King")], role="ingester")
    receive(api)
    file = tmp_path / "corrected"
    file.write_text(json.dumps(visit("1", "V3", "Byron")))
    ((number,),) = query(api, "SELECT id FROM ops.dead_letters")
    assert edit(number, file)["received"]
    assert list_family_names(api)[-1] == "Byron"


def test_rows_that_were_discarded_or_corrected_during_a_replay_stay_so(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    post_conflicts(api, 3)
    file = tmp_path / "corrected"
    file.write_text(json.dumps(visit("1", "V9")))
    find_open = rejected_rows.find_open

    def find_before_others(conn: Connection, selection: Selection, rules: Any) -> list[int]:
        found = find_open(conn, selection, rules)
        words = ["dead-letters", "discard", str(found[0]), "--reason", "no"]
        assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
        assert edit(found[1], file)["received"]
        return found

    monkeypatch.setattr(rejected_rows, "find_open", find_before_others)
    assert replay_rows(api) == {"received": 1, "failed": 0, "remaining": 0}
    statuses = [(status, (resolution or "").split(" ")[0]) for status, _, resolution in list_statuses(api)]
    assert sorted(statuses) == [("discarded", "discarded"), ("resolved", "corrected"), ("resolved", "replayed")]
    assert list_visits(api) == 2


def test_a_row_that_was_resolved_meanwhile_is_not_corrected(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    post_conflict(api)
    file = tmp_path / "corrected"
    file.write_text(json.dumps(visit("1", "V9")))
    ((number,),) = query(api, "SELECT id FROM ops.dead_letters")
    receive_correction = visit_rows.receive_correction

    def receive_after_replay(*arguments: Any) -> Any:
        query(api, "UPDATE ops.dead_letters SET status = 'resolved', resolution = 'replayed' RETURNING 1")
        return receive_correction(*arguments)

    monkeypatch.setattr(visit_rows, "receive_correction", receive_after_replay)
    with pytest.raises(CorrectionRefused, match="resolved meanwhile"):
        edit(number, file)
    assert list_statuses(api) == [("resolved", 1, "replayed")]
    assert (list_visits(api), query(api, "SELECT count(*) FROM ops.corrections")) == (2, [(0,)])


def test_a_request_receives_a_limited_number_of_rows_in_few_transactions(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fhir_assets.api.runs.MAX_ROWS", 4)
    monkeypatch.setattr(visit_rows, "ROWS_PER_RECEIPT", 3)
    post_conflicts(api, 6)
    before = query(api, "SELECT count(*) FROM ops.received WHERE resource_type = 'Encounter'")[0][0]
    assert replay_rows(api) == {"received": 4, "failed": 0, "remaining": 2}
    assert query(api, "SELECT count(*) FROM ops.received WHERE resource_type = 'Encounter'") == [(before + 2,)]
    assert replay_rows(api) == {"received": 2, "failed": 0, "remaining": 0}
    assert {status for status, *_ in list_statuses(api)} == {"resolved"}
    assert list_visits(api) == 6


def test_rows_that_failed_again_do_not_keep_others_from_their_turn(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fhir_assets.api.runs.MAX_ROWS", 1)
    post_conflicts(api, 2)
    api.post("/ingest", json=[visit("1", "V0", reason="third")], role="ingester")
    receive(api, "3f9a1c2b-0000-4000-8000-000000000002")
    answers = [replay_rows(api) for _ in range(2)]
    assert sum(answer["received"] for answer in answers) == sum(answer["failed"] for answer in answers) == 1


def test_replayed_rows_are_audited_with_their_receipt_and_loaded_as_posts_are(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    audited = "SELECT count, detail FROM ops.audit_log WHERE action = 'replay' ORDER BY seq"
    posted = "SELECT DISTINCT posted FROM ops.received WHERE channel = 'replay'"
    post_conflicts(api, 1)
    replay_rows(api)
    assert (query(api, audited), query(api, posted)) == ([(1, {"stage": "fetch"})], [(True,)])
    query(api, "UPDATE ops.dead_letters SET status = 'open' RETURNING 1")
    query(api, "DELETE FROM ops.visits RETURNING 1")
    output = CliRunner().invoke(app, ["dead-letters", "replay", "--stage", "fetch", "--no-wait"]).output
    assert "1 rows of visit files are received" in output
    assert "marked" not in output
    assert query(api, audited)[1:] == [(1, {"waited": False})]
    query(api, "UPDATE ops.dead_letters SET status = 'open' RETURNING 1")
    query(api, "DELETE FROM ops.visits RETURNING 1")
    # The record is written with the rows, not after them.
    monkeypatch.setattr("fhir_assets.api.runs.replayable_windows.find_replayable", lambda *_: 1 / 0)
    assert api.post(f"/runs/{RUN}/replay?stage=fetch", role="operator").status_code == 500
    assert len(query(api, audited)) == 3


def test_a_row_is_not_superseded_by_the_visit_that_it_contradicts(api: Api) -> None:
    post_conflict(api)
    ((key,),) = query(
        api,
        """
        INSERT INTO fhir.resource (resource_type, id, as_of, arrived, partition_key, run_id, resource)
        SELECT 'Encounter', resource_id, now(), now(), partition_key, 'run', '{}'
        FROM ops.dead_letters
        RETURNING partition_key
        """,
    )
    assert api.settings.db_url
    with connect(api.settings.db_url.get_secret_value(), cipher=NO_ENCRYPTION) as conn:
        assert replays.resolve_superseded(conn, "run", "Encounter", [key]) == set()
    assert list_statuses(api) == [("open", 1, None)]


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
