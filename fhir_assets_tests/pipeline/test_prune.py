"""``prune`` removes old data and keeps all_runs that is still used."""

import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.definitions import build_definitions
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url
from fhir_assets_tests.support.content import add, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment, deploy

__all__ = ["deploy"]

DAY = datetime(2024, 1, 5, tzinfo=UTC)
YEAR = timedelta(days=365)


@pytest.fixture
def reloaded_deployment(deploy: Deploy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    """A window that was loaded twice, so that the first load is superseded, with a Patient that was corrected."""
    with SandboxServer([]) as server:
        add(server, *(patient(f"p{n}", DAY) for n in range(3)), patient("bad", DAY, gender="malee"))
        deployment = deploy(fhir_base_url=server.url, fhir_last_updated_gte="2024-01-05", fhir_resource_types="Patient")
        deployment.ingest(first=DAY, last=DAY)
        add(server, patient("bad", DAY + timedelta(hours=1), version="2"))
        deployment.ingest(first=DAY, last=DAY, refresh=Refresh.FULL)
        monkeypatch.setenv("DB_URL", deployment.url)
        monkeypatch.setenv("DAGSTER_HOME", str(deployment.settings.home / "dagster"))
        monkeypatch.setenv("DAGSTER_POSTGRES_URL", normalise_url(deployment.url, "psycopg2"))
        monkeypatch.setenv("FHIR_ASSETS_HOME", str(deployment.settings.home))
        monkeypatch.setenv("FHIR_LAST_UPDATED_GTE", "2024-01-05")
        monkeypatch.setenv("FHIR_RESOURCE_TYPES", "Patient")
        yield deployment


def make_older(deployment: Deployment) -> None:
    """Make the runs, dead letters and parts a year older."""
    with connect(deployment.url) as conn:
        conn.execute("UPDATE runs SET update_timestamp = update_timestamp - interval '1 year'")
        conn.execute("UPDATE ops.dead_letters SET resolved_at = resolved_at - interval '1 year'")
        conn.execute("UPDATE ops.ingestion_runs SET started_at = started_at - interval '1 year'")
    long_ago = time.time() - YEAR.total_seconds()
    for path in Path(deployment.settings.store_url).rglob("*.gz"):
        os.utime(path, (long_ago, long_ago))


def prune(*arguments: str) -> dict[str, dict[str, Any]]:
    result = CliRunner().invoke(app, ["prune", "--json", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return {kind["what"]: kind for kind in json.loads(result.output)["kinds"]}


def parts(deployment: Deployment) -> set[str]:
    root = Path(deployment.settings.store_url)
    return {path.relative_to(root).as_posix() for path in root.rglob("*.gz")}


def test_nothing_is_removed_that_is_recent_or_without_apply(reloaded_deployment: Deployment) -> None:
    assert all(kind["old"] == 0 for kind in prune().values())
    make_older(reloaded_deployment)
    before = parts(reloaded_deployment)
    counted = prune()
    assert {name for name, kind in counted.items() if kind["old"]} >= {"events", "runs", "dead-letters", "store"}
    assert all(kind["removed"] == 0 for kind in counted.values())
    assert parts(reloaded_deployment) == before


def test_old_data_is_removed_and_used_data_is_kept(reloaded_deployment: Deployment) -> None:
    make_older(reloaded_deployment)
    tables = reloaded_deployment.tables()
    removed = prune("--apply")
    assert removed["runs"]["removed"] == 1
    assert removed["dead-letters"]["removed"] == 1
    assert removed["store"]["removed"] > 0
    used_parts = {
        part.name
        for layer in ("raw", "validated")
        for manifest in reloaded_deployment.store.manifests(layer, "Patient", ["2024-01-05"])
        for part in manifest.parts
    }
    assert parts(reloaded_deployment) == used_parts
    keys = [dg.AssetKey([layer, "patient"]) for layer in ("raw", "validated", "normalized")]
    assert all(reloaded_deployment.instance.get_materialized_partitions(key) == {"2024-01-05"} for key in keys)
    assert reloaded_deployment.tables() == tables
    assert all(kind["old"] == 0 for kind in prune().values())
    outcomes = reloaded_deployment.ingest(first=DAY, last=DAY, refresh=Refresh.WINDOW)
    assert [reloaded_deployment.unreconciled(outcome) for outcome in outcomes] == [[]]


def test_parts_that_a_running_load_may_use_are_kept(reloaded_deployment: Deployment) -> None:
    make_older(reloaded_deployment)
    before = parts(reloaded_deployment)
    with connect(reloaded_deployment.url) as conn:
        conn.execute(
            "INSERT INTO ops.ingestion_runs (run_id, resource_type, partition_key, status, started_at)"
            " VALUES ('long', 'Patient', '2024-01-05', 'RUNNING', now() - interval '2 years')"
        )
    assert prune("--apply", "--only", "store")["store"]["removed"] == 0
    assert parts(reloaded_deployment) == before


def test_failed_windows_are_reported_with_the_commands_that_load_them_again(
    deploy: Deploy, reloaded_deployment: Deployment
) -> None:
    with connect(reloaded_deployment.url) as conn:
        for day in (7, 8, 12):
            conn.execute(
                "INSERT INTO ops.ingestion_runs (run_id, resource_type, partition_key, status, error)"
                " VALUES (%s, 'Patient', %s, 'FAILED', 'the server is down')",
                [f"r{day}", f"2024-01-{day:02}"],
            )
    result = (
        build_definitions(reloaded_deployment.settings)
        .resolve_job_def("check_tables")
        .execute_in_process(instance=reloaded_deployment.instance)
    )
    check = {e.check_name: e for e in result.get_asset_check_evaluations()}["no_failed_partitions"]
    assert not check.passed
    assert check.metadata["failed_partitions"].value == 3
    description = check.description or ""
    assert "--from 2024-01-07 --to 2024-01-08" in description
    assert "--from 2024-01-12 --to 2024-01-12" in description


def test_runs_are_listed_by_filters_and_shown_with_their_dead_letters(reloaded_deployment: Deployment) -> None:
    def list_runs(*arguments: str) -> list[dict[str, Any]]:
        result = CliRunner().invoke(app, ["runs", "list", "--json", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        runs: list[dict[str, Any]] = json.loads(result.output)
        return runs

    all_runs = list_runs()
    assert len(all_runs) == 2
    assert [run["run_id"] for run in list_runs("--by", "test")] == [run["run_id"] for run in all_runs]
    assert list_runs("--by", "schedule") == []
    assert list_runs("--since", "2100-01-01") == []
    assert list_runs("--status", "failed") == []
    first = all_runs[-1]
    assert first["link"].endswith(f"/runs/{first['run_id']}")
    with connect(reloaded_deployment.url) as conn:
        conn.execute("UPDATE ops.dead_letters SET status = 'open'")
    shown = CliRunner().invoke(app, ["runs", "show", first["run_id"][:8], "--json"], catch_exceptions=False)
    [row] = json.loads(shown.output)
    assert (row["fetched"], row["valid"], row["dead"], row["loaded"]) == (4, 3, 1, 3)
    assert row["dead_letters"] == {"validate": 1}
    assert "validate 1" in CliRunner().invoke(app, ["runs", "show", first["run_id"][:8]]).output
