"""Windows over time: which windows are fetched when, which version wins, and that all ways to load are equivalent."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
import requests

from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.content import add, instant, list_search_intervals, materialize, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment

DAY = datetime(2024, 1, 5, tzinfo=UTC)
KEY = "2024-01-05"
GENDERS = "SELECT id, gender FROM fhir.patient ORDER BY id"


def deploy_patients(deploy: Deploy, server: SandboxServer, **settings: object) -> Deployment:
    values = {"fhir_resource_types": "Patient", "fhir_last_updated_gte": "2024-01-01", **settings}
    return deploy(fhir_base_url=server.url, **values)


def reconciles(deployment: Deployment, *runs: dg.ExecuteInProcessResult) -> bool:
    """Return whether the runs succeeded with at least one check, and every check passed."""
    evaluations = [evaluation for run in runs for evaluation in deployment.checks(run.run_id)]
    passed = all(evaluation.passed for evaluation in evaluations)
    return all(run.success for run in runs) and bool(evaluations) and passed


def test_a_second_ingest_extends_the_open_window_from_the_checkpoint(deploy: Deploy) -> None:
    now = datetime.now(UTC)
    with SandboxServer([patient("a", now - timedelta(seconds=5))]) as server:
        deployment = deploy_patients(deploy, server, fhir_overlap_seconds=60)
        assert [outcome.success for outcome in deployment.ingest()] == [True]
        ((_, first_until),) = list_search_intervals(server)
        add(server, patient("late", datetime.now(UTC) - timedelta(seconds=30)))
        server.reset_stats()
        outcomes = deployment.ingest()
        ((again_from, _),) = list_search_intervals(server)
    until = datetime.fromisoformat(first_until)
    assert datetime.fromisoformat(again_from) == until - timedelta(seconds=60)
    assert deployment.count_loaded() == {"Patient": 2}
    assert [deployment.unreconciled(outcome) for outcome in outcomes] == [[]]


def test_the_next_ingest_loads_updated_and_created_resources(deploy: Deploy) -> None:
    with SandboxServer([patient("a", DAY, gender="male"), patient("b", DAY, gender="male")]) as server:
        deployment = deploy_patients(deploy, server, fhir_partition="monthly")
        assert all(outcome.success for outcome in deployment.ingest())
        for identity in ("a", "c"):
            body = {"resourceType": "Patient", "id": identity, "gender": "female"}
            requests.put(f"{server.url}/Patient/{identity}", json=body, timeout=10).raise_for_status()
        server.reset_stats()
        outcomes = deployment.ingest()
        assert all(outcome.success for outcome in outcomes)
        assert all(
            datetime.fromisoformat(start) > DAY + timedelta(days=60) for start, _ in list_search_intervals(server)
        )
        newer = [("a", "female"), ("b", "male"), ("c", "female")]
        assert deployment.query(GENDERS) == newer
        assert deployment.query("SELECT version_id FROM fhir.patient WHERE id = 'a'") == [("2",)]
        assert all(outcome.success for outcome in deployment.ingest(first=DAY, last=DAY, refresh=Refresh.WINDOW))
        assert deployment.query(GENDERS) == newer


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_older_version_never_replaces_a_newer_one_in_any_order_of_windows(
    deploy: Deploy, tmp_path: Path, order: tuple[int, int]
) -> None:
    older = patient("a", DAY, version="1", gender="male", name=[{"family": "A"}, {"family": "B"}])
    newer = patient("a", DAY + timedelta(days=3), version="2", gender="female", name=[{"family": "C"}])
    (tmp_path / "Patient.ndjson").write_bytes(b"\n".join([older, newer]) + b"\n")
    deployment = deploy(fhir_source="ndjson", fhir_base_url=str(tmp_path), fhir_resource_types="Patient")
    windows = [DAY, DAY + timedelta(days=3)]
    runs = [deployment.ingest(first=windows[n], last=windows[n]) for n in order]
    assert [outcome.success for run in runs for outcome in run] == [True, True]
    assert deployment.query("SELECT gender FROM fhir.patient") == [("female",)]
    assert deployment.query("SELECT family FROM fhir.patient_name") == [("C",)]
    again = materialize(deployment, "normalized/patient", "normalized/patient_name", windows=[KEY])
    assert again.success
    assert deployment.query("SELECT gender FROM fhir.patient") == [("female",)]
    assert deployment.query("SELECT family FROM fhir.patient_name") == [("C",)]


def test_materializing_a_complete_window_fetches_it_again_and_an_ingest_does_not(deploy: Deploy) -> None:
    with SandboxServer([patient("a", DAY)]) as server:
        deployment = deploy_patients(deploy, server)
        deployment.ingest(first=DAY, last=DAY)
        add(server, patient("forgotten", DAY + timedelta(hours=1)))
        server.reset_stats()
        assert all(outcome.success for outcome in deployment.ingest(first=DAY, last=DAY))
        assert list_search_intervals(server) == []
        assert deployment.count_loaded() == {"Patient": 1}
        keys = ("raw/patient", "validated/patient", "normalized/patient", "normalized/patient_name")
        assert materialize(deployment, *keys, windows=[KEY]).success
        assert list_search_intervals(server) == [(instant(DAY), instant(DAY + timedelta(days=1)))]
    assert deployment.count_loaded() == {"Patient": 2}
    assert reconciles(deployment, materialize(deployment, windows=[KEY]))


def test_a_full_refresh_fetches_everything_again(deploy: Deploy) -> None:
    with SandboxServer([patient("a", datetime.now(UTC) - timedelta(seconds=5))]) as server:
        deployment = deploy_patients(deploy, server)
        deployment.ingest()
        first = list_search_intervals(server)[0][0]
        server.reset_stats()
        outcomes = deployment.ingest(refresh=Refresh.FULL)
        assert [start for start, _ in list_search_intervals(server)] == [first]
    assert [deployment.unreconciled(outcome) for outcome in outcomes] == [[]]
    assert deployment.count_loaded() == {"Patient": 1}


def test_a_type_that_the_server_does_not_offer_is_skipped_until_it_does(deploy: Deploy) -> None:
    now = datetime.now(UTC)
    meta = {"lastUpdated": instant(now - timedelta(hours=50))}
    organization = {"resourceType": "Organization", "id": "o", "meta": meta, "name": "O"}
    with SandboxServer([patient("a", now - timedelta(seconds=5))], all_types=False) as server:
        deployment = deploy_patients(
            deploy, server, fhir_resource_types="Organization,Patient", fhir_last_updated_gte=None
        )
        assert [outcome.success for outcome in deployment.ingest()] == [True]
        assert list_search_intervals(server, "Organization") == []
        assert deployment.count_loaded() == {"Patient": 1}
        add(server, json.dumps(organization).encode())
        outcomes = deployment.ingest()
        assert [deployment.unreconciled(outcome) for outcome in outcomes] == [[]] * len(outcomes)
    assert deployment.count_loaded() == {"Organization": 1, "Patient": 1}


def test_a_range_run_and_runs_of_single_partitions_give_the_same_tables(
    deploy: Deploy, tmp_path: Path, empty_database: str
) -> None:
    types = "Patient,Encounter"
    windows = [f"2024-01-0{day}" for day in range(1, 5)]
    write_population(tmp_path, Population(3, 5, 0.2, start=DAY - timedelta(days=4), end=DAY))
    keys = [f"{layer}/{kind}" for layer in ("raw", "validated", "normalized") for kind in ("patient", "encounter")]
    with SandboxServer(tmp_path) as server:
        ranged = deploy_patients(deploy, server, fhir_resource_types=types, home="ranged")
        assert materialize(ranged, *keys, windows=windows).success
        single = deploy_patients(deploy, server, fhir_resource_types=types, home="single", url=empty_database)
        for window in reversed(windows):
            assert materialize(single, *keys, windows=[window]).success
    assert ranged.count_loaded()["Encounter"] > 10
    assert sum(ranged.count_dead_letters().values()) > 0
    assert ranged.tables() == single.tables()
    assert ranged.count_dead_letters() == single.count_dead_letters()
    for window in windows:
        for layer in ("raw", "validated"):
            rows = [d.store.manifest(layer, "Encounter", window) for d in (ranged, single)]
            assert len({manifest.rows if manifest else None for manifest in rows}) == 1


def test_one_view_of_a_type_can_be_materialized_before_the_others(deploy: Deploy) -> None:
    body = patient("a", DAY, gender="male", name=[{"family": "A"}, {"family": "B"}])
    with SandboxServer([body]) as server:
        deployment = deploy_patients(deploy, server)
        assert materialize(deployment, "raw/patient", "validated/patient", windows=[KEY]).success
        assert materialize(deployment, "normalized/patient_name", windows=[KEY]).success
        assert deployment.query("SELECT family FROM fhir.patient_name ORDER BY 1") == [("A",), ("B",)]
        assert deployment.query("SELECT to_regclass('fhir.patient')") == [(None,)]
        assert all(outcome.success for outcome in deployment.ingest(first=DAY, last=DAY))
    assert deployment.query(GENDERS) == [("a", "male")]
    assert deployment.query("SELECT family FROM fhir.patient_name ORDER BY 1") == [("A",), ("B",)]


def test_the_reconciliation_check_can_be_executed_alone(deploy: Deploy) -> None:
    with SandboxServer([patient("a", DAY)]) as server:
        deployment = deploy_patients(deploy, server)
        deployment.ingest(first=DAY, last=DAY)
        server.reset_stats()
        result = materialize(deployment, windows=[KEY])
        assert server.stats()["recent"] == []
    assert reconciles(deployment, result)
    assert result.get_asset_materialization_events() == []
    (evaluation,) = deployment.checks(result.run_id)
    assert evaluation.partition == KEY
    assert evaluation.metadata["loaded"].value == 1
