"""Dead letters are corrected and replayed: resolved ones are loaded, the windows reconcile, no replay is repeated."""

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.definitions import build_definitions
from fhir_assets.errors import CorrectionRefused
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.ops import corrections, dead_letters, liveness, replays
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import add, materialize, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.replays import (
    DAY,
    KEY,
    count_genders,
    edit,
    find_dead_letter,
    find_dead_letters,
    load_invalid_genders,
    reconcile,
    run_dead_letters,
    serve_invalid_genders,
)

LAYERS = ("raw/patient", "validated/patient", "normalized/patient")


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    with serve_invalid_genders() as server:
        yield server


@pytest.fixture
def deployment(deploy: Deploy, server: SandboxServer, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    return load_invalid_genders(deploy, server, monkeypatch)


def test_a_corrected_resource_is_loaded_in_its_own_window_and_one_that_fails_again_is_reopened(
    deployment: Deployment, tmp_path: Path
) -> None:
    first = find_dead_letters(deployment)[0].run_id
    edit(tmp_path, find_dead_letter(deployment, "p0-0"))
    output = run_dead_letters("replay", "--run", first)
    assert (output["dead_letters"], output["resolved"], output["failed"], output["success"]) == (6, 1, 5, True)
    assert count_genders(deployment) == {"male": 14, "female": 1}
    assert deployment.query("SELECT partition_key FROM fhir.resource WHERE id = 'p0-0'") == [(KEY,)]
    assert reconcile(deployment, KEY, "2024-01-06")
    corrected = find_dead_letter(deployment, "p0-0")
    (replay,) = output["runs"]
    assert (corrected.status, corrected.resolution, corrected.resolved_run_id) == ("resolved", "corrected", replay)
    again = find_dead_letters(deployment, status="open")
    assert {(entry.attempts, entry.run_id, entry.first_run_id) for entry in again} == {(2, replay, first)}
    assert [entry.id for entry in find_dead_letters(deployment, run_id=first)] == [
        entry.id for entry in find_dead_letters(deployment)
    ]
    rows = deployment.query(
        "SELECT partition_key, replay_of_run_id, valid, dead, loaded FROM ops.ingestion_runs WHERE run_id = %s"
        " ORDER BY 1",
        replay,
    )
    assert rows == [(KEY, first, 1, 2, 1), ("2024-01-06", first, 0, 3, 0)]
    shown = run_dead_letters("show", str(corrected.id))
    assert shown["corrected_by"] == "anna"
    assert "wrong" not in json.dumps(shown)
    assert "wrong" in run_dead_letters("show", str(corrected.id), "--resource")["resource"]


@pytest.mark.slow
def test_a_window_that_is_materialized_again_keeps_the_correction(deployment: Deployment, tmp_path: Path) -> None:
    edit(tmp_path, find_dead_letter(deployment, "p0-0"))
    assert materialize(deployment, *LAYERS, windows=[KEY], refresh=Refresh.FULL).success
    assert count_genders(deployment) == {"male": 14, "female": 1}
    assert find_dead_letter(deployment, "p0-0").resolution == "corrected"
    run_dead_letters("replay", "--all")
    assert materialize(deployment, *LAYERS, windows=[KEY], refresh=Refresh.FULL).success
    assert count_genders(deployment) == {"male": 14, "female": 1}
    assert find_dead_letter(deployment, "p0-0").status == "resolved"
    assert reconcile(deployment, KEY)


def test_a_resource_corrected_at_the_source_resolves_its_dead_letter_and_the_check_of_its_window_passes(
    server: SandboxServer, deployment: Deployment
) -> None:
    later = DAY + timedelta(days=2)
    add(server, *(patient(f"p0-{n}", later, version="2", gender="other") for n in range(3)))
    (outcome,) = deployment.ingest(first=later, last=later)
    rates = deployment.checks(outcome.run_id, "dead_letter_rate")
    assert {entry.partition: entry.passed for entry in rates} == {KEY: True, "2024-01-07": True}
    assert find_dead_letter(deployment, "p0-1").resolution == "superseded by a newer version"
    materialize(deployment, "validated/patient", "normalized/patient", windows=[KEY])
    assert find_dead_letter(deployment, "p0-1").status == "resolved"
    assert reconcile(deployment, KEY, "2024-01-06", "2024-01-07")


@pytest.mark.slow
def test_one_correction_resolves_all_equal_lines(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    line = patient("twin", DAY, gender="wrong") + b"\n"
    (folder / "Patient.ndjson").write_bytes(line * 3)
    deployment = deploy(
        fhir_source="ndjson",
        fhir_base_url=str(folder),
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-01",
    )
    deployment.ingest()
    (dead_letter,) = find_dead_letters(deployment)
    assert dead_letter.occurrences == 3
    with connect(deployment.url, cipher=NO_ENCRYPTION) as conn:
        body = dead_letters.read_resource(conn, dead_letter.id)
        assert body
        corrections.record(conn, dead_letter.id, body.replace(b"wrong", b"male"), by="anna")
    (outcome,) = deployment.ingestion().replay(Selection(), triggered_by="test")
    assert outcome.success
    assert reconcile(deployment, KEY)
    assert count_genders(deployment) == {"male": 1}


def test_a_valid_resource_that_no_view_could_turn_into_rows_is_corrected_and_loaded(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    without_id = b'{"resourceType":"Patient","meta":{"lastUpdated":"2024-01-05T01:00:00Z"},"gender":"male"}\n'
    (folder / "Patient.ndjson").write_bytes(patient("a", DAY) + b"\n" + without_id)
    deployment = deploy(
        fhir_source="ndjson",
        fhir_base_url=str(folder),
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-01",
    )
    for name, value in deployment.environment().items():
        monkeypatch.setenv(name, value)
    deployment.ingest()
    (dead_letter,) = find_dead_letters(deployment)
    assert (dead_letter.stage, dead_letter.status) == ("transform", "open")
    assert reconcile(deployment, KEY)
    assert run_dead_letters("replay", str(dead_letter.id))["failed"] == 1
    edit(tmp_path, dead_letter, [{"op": "add", "path": "/id", "value": "b"}])
    assert run_dead_letters("replay", str(dead_letter.id))["resolved"] == 1
    assert deployment.query("SELECT id FROM fhir.patient ORDER BY 1") == [("a",), ("b",)]
    assert reconcile(deployment, KEY)
    with connect(deployment.url) as conn:
        conn.execute("DELETE FROM fhir.patient WHERE id = 'b'")
    assert not reconcile(deployment, KEY)
    assert materialize(deployment, *LAYERS, windows=[KEY], refresh=Refresh.FULL).success
    assert deployment.query("SELECT id FROM fhir.patient ORDER BY 1") == [("a",), ("b",)]
    assert find_dead_letters(deployment, status="open") == []
    assert reconcile(deployment, KEY)


@pytest.mark.slow
def test_a_resource_that_never_reached_raw_is_received_when_it_is_corrected(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "Patient.ndjson").write_bytes(patient("a", DAY) + b'\n{"resourceType":"Patient","id":"b",\n')
    deployment = deploy(
        fhir_source="ndjson",
        fhir_base_url=str(folder),
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-01",
    )
    for name, value in deployment.environment().items():
        monkeypatch.setenv(name, value)
    deployment.ingest()
    (dead_letter,) = find_dead_letters(deployment)
    assert dead_letter.stage == "fetch"
    whole = tmp_path / "whole.json"
    whole.write_bytes(patient("b", DAY + timedelta(hours=1)))
    assert run_dead_letters("edit", str(dead_letter.id), "--resource", str(whole))["received"]
    ingestion = deployment.ingestion()
    outcomes = [ingestion.load_received(entry, triggered_by="test") for entry in ingestion.find_received()]
    assert [deployment.unreconciled(outcome) for outcome in outcomes] == [[]]
    assert deployment.query("SELECT id FROM fhir.patient ORDER BY 1") == [("a",), ("b",)]
    window = dead_letter.partition_key
    assert materialize(deployment, *LAYERS, windows=[window], refresh=Refresh.FULL).success
    assert [(entry.status, entry.resolution) for entry in find_dead_letters(deployment)] == [("resolved", "corrected")]


def test_an_edit_that_leaves_the_resource_invalid_is_refused_and_not_stored(
    deployment: Deployment, tmp_path: Path
) -> None:
    dead_letter = find_dead_letter(deployment, "p0-0")
    for patch, message in (
        ([{"op": "replace", "path": "/gender", "value": "secret"}], "required-binding at Patient.gender"),
        ([{"op": "replace", "path": "/nothing/there", "value": 1}], "operation 1 of the patch (replace)"),
        ([{"op": "replace", "path": "/id", "value": "other"}], "id"),
        ([{"op": "replace", "path": "/resourceType", "value": "Group"}], "Patient"),
        ({"no": "array"}, "array"),
    ):
        path = tmp_path / "patch.json"
        path.write_text(json.dumps(patch))
        with pytest.raises(CorrectionRefused) as refused:
            run_dead_letters("edit", str(dead_letter.id), "--patch", str(path))
        assert message in str(refused.value)
        assert "secret" not in str(refused.value)
    assert deployment.query("SELECT count(*) FROM ops.corrections") == [(0,)]


@pytest.mark.slow
def test_discarded_dead_letters_are_not_counted_and_can_be_replayed_by_id(
    deployment: Deployment, tmp_path: Path
) -> None:
    assert run_dead_letters("discard", "--window", KEY, "--reason", "test data")["discarded"] == 3
    assert "test data" in (find_dead_letter(deployment, "p0-2").resolution or "")
    assert run_dead_letters("replay", "--window", KEY)["dead_letters"] == 0
    assert materialize(deployment, *LAYERS, windows=[KEY]).success
    assert {entry.status for entry in find_dead_letters(deployment, partition_keys=[KEY])} == {"discarded"}
    dead_letter = find_dead_letter(deployment, "p0-2")
    edit(tmp_path, dead_letter)
    assert run_dead_letters("replay", str(dead_letter.id))["resolved"] == 1
    assert reconcile(deployment, KEY)


@pytest.mark.parametrize(("words", "done"), [(("replay",), "failed"), (("discard", "--reason", "known"), "discarded")])
def test_an_id_without_a_dead_letter_is_passed_over_and_the_exit_code_says_so(
    deployment: Deployment, words: tuple[str, ...], done: str
) -> None:
    known = find_dead_letter(deployment, "p0-0").id
    result = CliRunner().invoke(
        app, ["dead-letters", *words, str(known), "987654321", "--json"], catch_exceptions=False
    )
    assert result.exit_code == 1
    output = json.loads(result.stdout)
    assert (output[done], output["not_found"]) == (1, 1)
    assert "1 of the ids do not belong to dead letters that" in result.stderr
    assert "987654321" not in result.stdout


def test_a_dead_letter_that_another_run_replays_is_pending_and_the_exit_code_says_so(deployment: Deployment) -> None:
    with connect(deployment.url) as conn:
        liveness.hold_liveness_lock(conn, "another")
        known = find_dead_letter(deployment, "p0-0").id
        conn.execute("UPDATE ops.dead_letters SET status = 'replaying', claimed_by = 'another' WHERE id = %s", [known])
        conn.commit()
        result = CliRunner().invoke(app, ["dead-letters", "replay", str(known), "--json"], catch_exceptions=False)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["not_found"] == 1


def test_a_dead_letter_is_never_replayed_by_two_runs_at_once(deployment: Deployment) -> None:
    with connect(deployment.url, autocommit=True) as process, connect(deployment.url, autocommit=True) as other:
        liveness.hold_liveness_lock(process, "first")
        assert replays.request_replay(process, Selection(partition_keys=[KEY]), claimed_by="first") == 3
        assert replays.find_requested(other) == []
        assert not replays.claim(other, "second", "Patient", ["validate"], {KEY: []}, also_open=True)
    with connect(deployment.url, autocommit=True) as conn:
        while liveness.find_alive(conn, ["first"]):  # Postgres releases the lock after the connection is closed.
            time.sleep(0.01)
        assert [(entry.partition_key, entry.dead_letters) for entry in replays.find_requested(conn)] == [(KEY, 3)]
        assert replays.claim(conn, "second", "Patient", ["validate"], {KEY: []}, also_open=False)


@pytest.mark.slow
def test_the_replay_job_launched_by_hand_replays_the_open_dead_letters_of_its_windows(
    deployment: Deployment, tmp_path: Path
) -> None:
    for name in ("p0-0", "p1-0"):
        edit(tmp_path, find_dead_letter(deployment, name))
    result = (
        build_definitions(deployment.settings)
        .resolve_job_def("replay_dead_letters")
        .execute_in_process(instance=deployment.instance, partition_key=KEY, raise_on_error=False)
    )
    assert result.success
    assert [find_dead_letter(deployment, name).status for name in ("p0-0", "p1-0")] == ["resolved", "open"]
