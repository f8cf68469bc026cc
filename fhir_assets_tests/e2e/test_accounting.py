"""The counts of a run add up: each fetched resource is loaded, superseded, dead, withheld or older than the start."""

import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.ingestion.outcome import Outcome
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.settings import SourceKind
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import runs
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.scripted_server import ReceivedRequest
from fhir_assets_tests.support.search_server import Resource, SearchServer, resource

COUNTS = ("fetched", "older", "valid", "dead", "withheld", "superseded", "loaded")

LINES: dict[str, Callable[[int], str]] = {
    "valid": lambda n: json.dumps(resource("Patient", f"p{n}", f"2024-03-{n % 28 + 1:02}T10:00:00Z")),
    "valid again": lambda n: json.dumps(resource("Patient", "same")),
    "newer version": lambda n: json.dumps(resource("Patient", "newer", f"2024-0{n % 3 + 2}-05T10:00:00Z")),
    "older than the start": lambda n: json.dumps(resource("Patient", f"old{n}", "2019-03-05T10:00:00Z")),
    "invalid": lambda n: json.dumps(resource("Patient", f"bad{n}", gender="x")),
    "of another type": lambda n: json.dumps(resource("Group", f"g{n}")),
    "without id": lambda n: json.dumps({"resourceType": "Patient", "meta": {"lastUpdated": "2024-03-05T10:00:00Z"}}),
    "no JSON": lambda n: "{" * (n + 1),
}
"""Kinds of lines in a file Patient.ndjson, as functions of the number of the line."""


def counts(deployment: Deployment, outcomes: list[Outcome]) -> dict[str, int]:
    with connect(deployment.url) as conn:
        rows = runs.summarize(conn, [outcome.run_id for outcome in outcomes])
    total: dict[str, Any] = next((row for row in rows if row["type"] == "total"), {})
    return {name: total.get(name) or 0 for name in COUNTS}


def assert_adds_up(found: dict[str, int]) -> None:
    kept_back = found["older"] + found["dead"] + found["withheld"] + found["superseded"]
    assert found["fetched"] == kept_back + found["loaded"], found


@pytest.mark.parametrize("seed", [1, 2])
def test_the_counts_of_any_file_add_up_and_agree_with_the_tables_and_the_dead_letters(
    deploy: Deploy, tmp_path: Path, seed: int
) -> None:
    draw = Random(seed)
    kinds = [*LINES, *draw.choices(sorted(LINES), k=draw.randrange(40))]
    file = tmp_path / "Patient.ndjson"
    file.write_text("".join(f"{LINES[kind](n)}\n" for n, kind in enumerate(kinds)))
    deployment = deploy(
        fhir_source=SourceKind.NDJSON,
        fhir_base_url=str(file),
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-01",
        fhir_partition="monthly",
    )
    found = counts(deployment, deployment.ingest())
    assert found["fetched"] == len(kinds)
    assert_adds_up(found)
    agrees_with_state(deployment, found)
    # A file is read as a whole: the load after a change counts all of its lines again.
    with file.open("a") as lines:
        lines.writelines(f"{LINES[kind](n)}\n" for n, kind in enumerate(LINES, 100))
    again = counts(deployment, deployment.ingest())
    assert again["fetched"] == len(kinds) + len(LINES)
    assert_adds_up(again)


def agrees_with_state(deployment: Deployment, found: dict[str, int]) -> None:
    assert found["loaded"] == deployment.count_loaded().get("Patient", 0)
    assert found["dead"] == sum(deployment.count_dead_letters().values())


@pytest.fixture
def server() -> Iterator[SearchServer]:
    found = [resource("Patient", f"p{n}") for n in range(3)]
    with SearchServer([*found, resource("Patient", "bad", gender="x")]) as server:
        yield server


@pytest.fixture
def deployment(deploy: Deploy, server: SearchServer) -> Deployment:
    return deploy(
        fhir_base_url=server.url,
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-01",
        fhir_partition="monthly",
        fhir_max_attempts=1,
    )


def test_a_run_counts_what_it_did_and_not_what_the_window_had_before(
    deployment: Deployment, server: SearchServer
) -> None:
    assert counts(deployment, deployment.ingest()) == dict(zip(COUNTS, (4, 0, 3, 1, 0, 0, 3), strict=True))
    assert counts(deployment, deployment.ingest())["loaded"] == 0
    server.resources.append(resource("Patient", "p1", "2024-03-06T10:00:00Z", gender="male"))
    again = counts(deployment, deployment.ingest(refresh=Refresh.FULL))
    assert (again["fetched"], again["loaded"], again["superseded"], again["dead"]) == (5, 3, 1, 1)
    assert_adds_up(again)


def test_the_counts_of_a_run_into_a_window_with_earlier_data_have_one_scope(
    deployment: Deployment, server: SearchServer
) -> None:
    def add(key: str, seconds_ago: float, **elements: str) -> None:
        moment = datetime.now(UTC) - timedelta(seconds=seconds_ago)
        text = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        server.resources.append(resource("Patient", key, text, **elements))

    for n in range(10):
        add(f"n{n}", 60)
    deployment.ingest()
    add("new", 0)
    add("wrong", 0, gender="x")
    time.sleep(0.01)  # A load reads what was updated before it began.
    rows = deployment.query(
        "SELECT server_total, fetched, valid, dead, superseded, loaded FROM ops.run_types"
        " WHERE run_id = ANY(%s) AND fetched > 0",
        [outcome.run_id for outcome in deployment.ingest()],
    )
    assert rows == [(2, 2, 1, 1, 0, 1)]


def test_a_dead_letter_of_the_load_is_counted(deployment: Deployment, server: SearchServer) -> None:
    server.resources.append(resource("Patient", "nul", name=[{"family": b"a\\u0000b".decode("unicode_escape")}]))
    found = counts(deployment, deployment.ingest())
    assert_adds_up(found)
    agrees_with_state(deployment, found)


@pytest.mark.parametrize("layer", ["raw", "validated"])
def test_a_step_that_does_not_find_what_the_run_wrote_before_fails(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, layer: str
) -> None:
    read = Store.manifests

    def manifests(store: Store, asked: str, name: str, keys: Any) -> Any:
        return [] if asked == layer else read(store, asked, name, keys)

    monkeypatch.setattr(Store, "manifests", manifests)
    outcomes = deployment.ingest()
    assert not all(outcome.success for outcome in outcomes)
    with connect(deployment.url) as conn:
        reasons = [reason for outcome in outcomes for reason in runs.get_errors(conn, outcome.run_id)]
    assert any(f"does not have {layer}/Patient of 2024-03-01" in reason for reason in reasons)


def test_ingest_ends_with_1_while_a_window_does_not_reconcile(
    deployment: Deployment, server: SearchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count_too_many(bundle: Resource, request: ReceivedRequest) -> None:
        if {f"ge2024-{month}-01T00:00:00.000Z" for month in ("01", "03")}.intersection(request.all("_lastUpdated")):
            bundle["total"] += 1

    server.bend = count_too_many
    for name, value in deployment.environment().items():
        monkeypatch.setenv(name, value)
    first = CliRunner().invoke(app, ["ingest"])
    assert first.exit_code == 1
    assert "Patient of 2024-03-01 does not reconcile: the server counts" in first.stderr
    server.bend = None
    second = CliRunner().invoke(app, ["ingest", "--json"])
    assert second.exit_code == 1
    assert [row["window"] for row in json.loads(second.stdout)["unreconciled"]] == ["2024-03-01"]
    repair = CliRunner().invoke(app, ["ingest", "--from", "2024-03-01", "--to", "2024-03-01"])
    assert (repair.exit_code, repair.stderr) == (0, "")
    assert CliRunner().invoke(app, ["ingest"]).exit_code == 0
