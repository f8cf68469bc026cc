"""Runs that Dagster's daemon starts on a deployment: a backfill of three months, and the schedule."""

from datetime import timedelta
from pathlib import Path

import dagster as dg
import pytest

from fhir_assets.definitions import build_definitions
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.daemon import backfill, wait_until
from fhir_assets_tests.support.dagster_internals import InstigatorTick, TickStatus
from fhir_assets_tests.support.deployment import Deploy
from fhir_assets_tests.support.deployment_daemon import END, NEVER, START, daemon

pytestmark = pytest.mark.slow

TYPES = "Patient,Encounter,Observation"


def test_a_backfill_of_90_days_succeeds_and_reconciles(deploy: Deploy, tmp_path: Path, empty_database: str) -> None:
    write_population(tmp_path / "population", Population(10, 11, 0.02, start=START, end=END))
    days = [f"{START + timedelta(days=day):%Y-%m-%d}" for day in range((END - START).days)]
    with SandboxServer(tmp_path / "population") as server:
        deployment = deploy(
            fhir_base_url=server.url,
            fhir_resource_types=TYPES,
            fhir_last_updated_gte="2024-01-01",
            fhir_windows_per_run=40,
        )
        with daemon(deployment, tmp_path / "daemon.log", FHIR_SCHEDULE=NEVER, FHIR_WINDOWS_PER_RUN="40"):
            runs = backfill(deployment.instance, build_definitions(deployment.settings), days, seconds=600)
        clean = deploy(
            home="clean",
            url=empty_database,
            fhir_base_url=server.url,
            fhir_resource_types=TYPES,
            fhir_last_updated_gte="2024-01-01",
        )
        assert all(outcome.success for outcome in clean.ingest(first=START, last=END))
    assert [run.status for run in runs] == [dg.DagsterRunStatus.SUCCESS] * 3
    partitions = deployment.query(
        "SELECT count(DISTINCT partition_key), min(status), max(status) FROM ops.ingestion_runs"
    )
    assert partitions == [(90, "SUCCESS", "SUCCESS")]
    evaluations = [evaluation for run in runs for evaluation in deployment.checks(run.run_id)]
    assert len(evaluations) >= 3
    assert all(evaluation.passed for evaluation in evaluations)
    assert deployment.tables() == clean.tables()
    assert deployment.count_dead_letters() == clean.count_dead_letters()


def test_the_schedule_loads_new_resources_and_requests_nothing_twice(deploy: Deploy, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "Patient.ndjson").write_bytes(patient("a", START) + b"\n")
    deployment = deploy(
        fhir_source="ndjson",
        fhir_base_url=str(folder),
        fhir_resource_types="Patient",
        fhir_partition="monthly",
        fhir_last_updated_gte="2024-01-01",
    )

    def ticks() -> list[InstigatorTick]:
        states = deployment.instance.all_instigator_state()
        return [
            tick
            for state in states
            if state.instigator_name == "incremental_load"
            for tick in reversed(deployment.instance.get_ticks(state.instigator_origin_id, state.selector_id))
            if tick.status is not TickStatus.STARTED
        ]

    with daemon(deployment, tmp_path / "daemon.log", FHIR_SCHEDULE="* * * * *"):
        wait_until(lambda: len(ticks()) >= 2, seconds=240)
        wait_until(lambda: deployment.count_loaded() == {"Patient": 1}, seconds=60)
        (folder / "more.Patient.ndjson").write_bytes(patient("b", START.replace(day=2)) + b"\n")
        before = len(ticks())
        wait_until(lambda: deployment.count_loaded() == {"Patient": 2}, seconds=180)
        wait_until(lambda: len(ticks()) >= before + 2, seconds=180)
    assert {tick.status for tick in ticks()} == {TickStatus.SUCCESS, TickStatus.SKIPPED}
    assert [tick.status for tick in ticks()].count(TickStatus.SUCCESS) == 2
    runs = deployment.instance.get_runs(dg.RunsFilter(tags={"dagster/schedule_name": "incremental_load"}))
    assert [run.status for run in runs] == [dg.DagsterRunStatus.SUCCESS] * 2
    triggers = deployment.query("SELECT DISTINCT triggered_by FROM ops.ingestion_runs")
    assert triggers == [("schedule_name:incremental_load",)]
