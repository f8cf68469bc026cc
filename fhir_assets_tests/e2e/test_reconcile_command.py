"""`fhir-assets reconcile` compares the source with the store and the tables, and names what is missing."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fhir_assets.cli.main import app
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.settings import SourceKind
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import materialize
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply
from fhir_assets_tests.support.search_server import Resource, SearchServer, resource

pytestmark = pytest.mark.slow


@pytest.fixture
def server() -> Iterator[SearchServer]:
    with SearchServer([resource("Patient", f"p{n}") for n in range(5)], types=("Patient", "Observation")) as server:
        server.resources.append(resource("Patient", "bad", gender="x"))
        yield server


@pytest.fixture
def deployment(deploy: Deploy, server: SearchServer, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    deployment = deploy(
        fhir_base_url=server.url,
        fhir_resource_types="Patient,Observation",
        fhir_last_updated_gte="2024-01-01",
        fhir_partition="monthly",
        fhir_max_attempts=1,
    )
    for name, value in deployment.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FHIR_MAX_ATTEMPTS", "1")
    deployment.ingest()
    return deployment


def run(*words: str) -> tuple[Result, dict[str, Any]]:
    result = CliRunner().invoke(app, ["reconcile", "--json", *words])
    return result, {row["type"]: row for row in json.loads(result.stdout)["types"]}


def test_types_that_the_source_does_not_have_are_named_and_nothing_compared_is_not_complete(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(app, ["reconcile", "--types", "Patient,Encounter"])
    assert result.exit_code == 0
    assert "Not compared, because the source does not have them: Encounter" in result.output
    result = CliRunner().invoke(app, ["reconcile", "--types", "Encounter"])
    assert result.exit_code == 1
    assert "Everything is accounted for" not in result.output
    result, types = run("--types", "Encounter")
    assert (result.exit_code, types, json.loads(result.stdout)["not_offered"]) == (1, {}, ["Encounter"])


def forget(deployment: Deployment, identity: str) -> None:
    """Lose a resource from the tables and from the store's record of what must be there."""
    with connect(deployment.url) as conn:
        conn.execute("DELETE FROM fhir.resource WHERE id = %s", [identity])


@pytest.mark.parametrize("deep", [[], ["--deep"]])
def test_a_complete_deployment_ends_with_0(deployment: Deployment, deep: list[str]) -> None:
    result, types = run(*deep)
    assert result.exit_code == 0, result.output
    patient = types["Patient"]
    assert (patient["source"], patient["loaded"], patient["dead"], patient["missing"]) == (6, 5, 1, 0)


def test_a_missing_resource_is_counted_and_with_deep_named(deployment: Deployment, server: SearchServer) -> None:
    server.resources.append(resource("Patient", "late", "2024-03-07T10:00:00Z"))
    result, types = run()
    assert result.exit_code == 1
    assert (types["Patient"]["missing"], types["Patient"]["missing_ids"]) == (1, [])
    result, types = run("--deep")
    assert result.exit_code == 1
    assert (types["Patient"]["missing"], types["Patient"]["missing_ids"]) == (1, ["late"])
    text = CliRunner().invoke(app, ["reconcile", "--deep"])
    assert "Patient/late" in text.stderr


def test_deep_finds_a_version_that_is_outdated_in_the_tables(deployment: Deployment, server: SearchServer) -> None:
    server.resources[0] = resource("Patient", "p0", "2024-03-07T10:00:00Z", gender="male")
    assert run()[0].exit_code == 0
    result, types = run("--deep")
    assert result.exit_code == 1
    assert types["Patient"]["missing_ids"] == ["p0"]


def test_what_was_updated_after_the_last_load_is_due_and_not_missing(
    deployment: Deployment, server: SearchServer
) -> None:
    later = (datetime.now(UTC) + timedelta(seconds=1)).isoformat(timespec="seconds")
    server.resources.append(resource("Patient", "new", later))
    for words in ([], ["--deep"]):
        result, types = run(*words)
        assert result.exit_code == 0, result.output
        assert (types["Patient"]["due"], types["Patient"]["missing"]) == (1, 0)


def test_what_the_server_deleted_unseen_is_a_surplus(deployment: Deployment, server: SearchServer) -> None:
    del server.resources[:2]
    result, types = run()
    assert result.exit_code == 0, result.output
    assert (types["Patient"]["missing"], types["Patient"]["surplus"]) == (0, 2)
    assert "removes what the source deleted" in CliRunner().invoke(app, ["reconcile"]).stderr
    deployment.ingest(refresh=Refresh.FULL)
    assert run()[1]["Patient"]["surplus"] == 0


def test_what_is_older_than_the_start_is_not_missing(deployment: Deployment, server: SearchServer) -> None:
    server.resources.append(resource("Patient", "old", "2019-03-05T10:00:00Z"))
    for words in ([], ["--deep"]):
        result, types = run(*words)
        assert result.exit_code == 0, result.output
        assert types["Patient"]["older"] == 1


def test_a_window_that_does_not_reconcile_is_listed(deployment: Deployment) -> None:
    forget(deployment, "p3")
    result, types = run("--deep")
    assert result.exit_code == 1
    assert types["Patient"]["missing_ids"] == ["p3"]
    assert [window["window"] for window in types["Patient"]["unreconciled_windows"]] == ["2024-03-01"]


def test_a_dead_letter_that_was_closed_by_mistake_is_named_and_fails_the_check(deployment: Deployment) -> None:
    with connect(deployment.url) as conn:
        conn.execute("UPDATE ops.dead_letters SET status = 'resolved', resolution = 'did not fail again'")
    result, types = run()
    assert (result.exit_code, types["Patient"]["missing"]) == (1, 1)
    ((window,), fault) = types["Patient"]["unreconciled_windows"], "1 invalid resources are in no table"
    assert window["faults"][0].startswith(fault)
    check = materialize(deployment, windows=[window["window"]])
    assert [evaluation.passed for evaluation in deployment.checks(check.run_id)] == [False]


def test_a_window_that_is_red_and_green_again_twice_is_reported_each_time(deployment: Deployment) -> None:
    with connect(deployment.url) as conn:
        (key,) = conn.execute("SELECT partition_key FROM fhir.resource LIMIT 1").fetchone() or ("",)
    for _ in range(2):
        with connect(deployment.url) as conn:
            conn.execute("UPDATE ops.dead_letters SET status = 'resolved', resolution = 'replayed'")
        materialize(deployment, windows=[key])
        assert [name for name, _ in deployment.ingestion().find_unreconciled_windows()] == ["Patient"]
        with connect(deployment.url) as conn:
            conn.execute("UPDATE ops.dead_letters SET status = 'open', resolution = NULL")
        assert deployment.ingestion().find_unreconciled_windows() == []
        assert deployment.ingestion().find_unreconciled_windows() == []


def test_a_server_that_does_not_count_is_unknown_and_not_complete(deployment: Deployment, server: SearchServer) -> None:
    def drop_totals(bundle: Resource, request: ReceivedRequest) -> None:
        bundle.pop("total")

    server.bend = drop_totals
    result, types = run()
    assert result.exit_code == 1
    assert types["Patient"]["missing"] is None
    assert run("--deep")[0].exit_code == 0


@pytest.mark.parametrize("invalid", ["a b", "a\0b", "a\ud800b"])
def test_resources_with_an_invalid_id_are_compared_by_number(
    deployment: Deployment, server: SearchServer, invalid: str
) -> None:
    server.resources.append(resource("Patient", invalid, "2024-03-07T10:00:00Z"))
    result, types = run("--deep")
    assert result.exit_code == 1
    assert (types["Patient"]["missing"], types["Patient"]["missing_ids"]) == (1, [])
    deployment.ingest(refresh=Refresh.FULL)
    result, types = run("--deep")
    assert result.exit_code == 0, result.output
    assert (types["Patient"]["dead"], types["Patient"]["missing"]) == (2, 0)


def test_a_refused_type_is_named_and_the_others_are_compared(deployment: Deployment, server: SearchServer) -> None:
    server.answer = lambda request, path: Reply(b"{}", 403) if path == "Observation" else None
    result = CliRunner().invoke(app, ["reconcile", "--json"])
    assert result.exit_code == 1
    assert [row["type"] for row in json.loads(result.stdout)["types"]] == ["Patient"]
    assert "Observation: GET" in str(result.exception)


def test_files_are_compared_by_deep(deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "Patient.ndjson"
    file.write_text("".join(f"{json.dumps(resource('Patient', f'p{n}'))}\n" for n in range(3)))
    deployment = deploy(
        fhir_source=SourceKind.NDJSON,
        fhir_base_url=str(file),
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-01",
        fhir_partition="monthly",
    )
    for name, value in deployment.environment().items():
        monkeypatch.setenv(name, value)
    deployment.ingest()
    assert run("--deep")[0].exit_code == 0
    with file.open("a") as lines:
        lines.write(json.dumps(resource("Patient", "more")) + "\n")
    result, types = run("--deep")
    assert (result.exit_code, types["Patient"]["missing_ids"]) == (1, ["more"])
