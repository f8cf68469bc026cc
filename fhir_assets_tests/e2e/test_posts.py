"""The post loader loads posts without waiting for other loads, and Dagster lists these loads like its own."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.metrics.status import read_status
from fhir_assets.orchestration.posts import loads
from fhir_assets.orchestration.posts.loader import PostLoader
from fhir_assets.pipeline.reconcile.verdicts import evaluate_windows
from fhir_assets.pipeline.reconcile.window_counts import find_main_view
from fhir_assets.pipeline.validate.step import ValidateStep
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.steps import loads as type_loads
from fhir_assets.steps.loads import load_windows
from fhir_assets.warehouse.ops import held_windows, landing_files, received
from fhir_assets_tests.support.api import Api, api_in_threads
from fhir_assets_tests.support.consent_forms import build_consent, build_settings
from fhir_assets_tests.support.content import materialize
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.interleaving import Killed
from fhir_assets_tests.support.landing import land, load_received, receive, tick
from fhir_assets_tests.support.posts import (
    build_loads,
    build_post_loader,
    count_pending,
    deploy_hospital,
    find_faults,
    is_running,
    post_loader_in_thread,
    post_patient,
    post_visit,
    reserved_lane,
    wait_until,
)
from fhir_assets_tests.support.uploads import read_back


def materialized(deployment: Deployment, layer: str, name: str) -> set[str]:
    return deployment.instance.get_materialized_partitions(dg.AssetKey([layer, name]))


def load_posts(deployment: Deployment) -> None:
    """Receive and load what waits, as the post loader does after a notification."""
    post_loads = build_loads(deployment)
    post_loads.receive_files()
    assert None not in list(post_loads.run())


def load_by_sensors(deployment: Deployment) -> None:
    """Load what waits as Dagster's daemon does: by the runs that its sensors request."""
    if tick(deployment).run_requests:
        assert receive(deployment).success
    if tick(deployment, "load_received").run_requests:
        assert load_received(deployment) == []


def test_a_posted_visit_is_shown_without_a_run_of_dagster(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy_hospital(deploy, tmp_path)
    with api_in_threads(deployment.settings) as api, post_loader_in_thread(deployment):
        task = post_visit(api, 1)
        wait_until(lambda: api.get(f"/ingest/tasks/{task}").json()["status"] == "loaded")
        (patient,) = api.get("/patients").json()["patients"]
        assert len(patient["visits"]) == 1
        post_patient(api, "posted", active=True)
        wait_until(lambda: api.get("/patients/posted").status_code == 200)
    assert deployment.instance.get_runs_count() == 0
    assert deployment.count_loaded() == {"Patient": 2, "Encounter": 1}
    windows = {key for (key,) in deployment.query("SELECT DISTINCT partition_key FROM ops.received")}
    for layer in ("raw", "validated", "normalized"):
        assert materialized(deployment, layer, "patient") == windows
    assert deployment.query("SELECT DISTINCT triggered_by, status FROM ops.ingestion_runs") == [("posts", "SUCCESS")]
    assert deployment.query("SELECT DISTINCT reconciled FROM ops.window_verdicts") == [(True,)]
    assert count_pending(deployment) == 0


def test_dagster_shows_the_results_of_the_checks_of_posted_windows(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy_hospital(deploy, tmp_path)
    with api_in_threads(deployment.settings) as api, post_loader_in_thread(deployment):
        post_patient(api, "a")
        wait_until(lambda: api.get("/patients/a").status_code == 200)
    asset = dg.AssetKey(["normalized", "patient"])
    (window,) = materialized(deployment, "normalized", "patient")
    results = deployment.query(
        "SELECT check_name, partition, execution_status FROM asset_check_executions WHERE asset_key = %s",
        asset.to_string(),
    )
    assert {("reconciles", window, "SUCCEEDED"), ("dead_letter_rate", window, "SUCCEEDED")} <= set(results)
    (record,) = deployment.instance.fetch_materializations(asset, limit=10).records
    assert record.asset_materialization
    shown = record.asset_materialization.metadata
    assert (shown["dagster/partition_row_count"].value, shown["loaded"].value) == (1, 1)


def test_the_sensors_leave_new_posts_to_a_running_loader_and_load_them_without_one(
    deploy: Deploy, tmp_path: Path
) -> None:
    deployment = deploy_hospital(deploy, tmp_path)
    with api_in_threads(deployment.settings) as api:
        with reserved_lane(deployment):
            post_visit(api, 1)
            post_patient(api, "a")
            assert tick(deployment).run_requests == []
            assert tick(deployment, "load_received").run_requests == []
            # A loader that does not load for half a minute is not waited for.
            deployment.query("UPDATE ops.received SET received_at = received_at - interval '1 minute' RETURNING 1")
            assert tick(deployment, "load_received").run_requests
            deployment.query("UPDATE ops.received SET asked = 0, asked_at = NULL RETURNING 1")
        assert not is_running(deployment)
        load_by_sensors(deployment)
        assert count_pending(deployment) == 0
        assert len(api.get("/patients").json()["patients"]) == 2


def test_a_landed_file_and_a_big_post_are_left_to_dagster(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy_hospital(deploy, tmp_path)
    (tmp_path / "landing" / "a.ndjson").write_bytes(b'{"resourceType":"Patient","id":"landed"}\n')
    monkeypatch.setattr(loads, "MAX_ROWS", 2)
    with api_in_threads(deployment.settings) as api:
        records = [{"resourceType": "Patient", "id": f"p{n}"} for n in range(3)]
        assert api.post("/api/v1/ingest", json={"records": records}).status_code == 202
    assert list(build_loads(deployment).run()) == []
    assert deployment.count_loaded() == {}
    assert land(deployment) == []
    assert deployment.count_loaded() == {"Patient": 4}


def test_a_load_of_posts_that_fails_is_tried_again_and_then_left(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deployment = deploy_hospital(deploy, tmp_path)
    with api_in_threads(deployment.settings) as api:
        post_patient(api, "a", birthDate="1970-01-31")
    post_loads = build_loads(deployment)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("1970-01-31")

    with monkeypatch.context() as patch:
        patch.setattr(loads, "load_windows", fail)
        attempts = 0
        while post_loads.seconds_to_next_attempt < 30 or not attempts:
            attempts += len(list(post_loads.run()))
        assert attempts == 3
    assert "posts are left to the job load_received" in caplog.text
    assert "1970" not in caplog.text
    load_by_sensors(deployment)
    assert deployment.count_loaded() == {"Patient": 1}


CRASH_POINTS: dict[str, tuple[Any, str, bool]] = {
    "before the batch of files": (landing_files, "assign_batch", False),
    "after the batch of files": (landing_files, "assign_batch", True),
    "after the receipt of the files": (landing_files, "record_loaded", False),
    "before the validation": (ValidateStep, "run", False),
    "before the commit of the partition": (type_loads, "commit_update", False),
    "before the load": (loads, "load_windows", False),
    "in the transaction of the load": (received, "record_loaded", True),
    "after the load": (loads, "load_windows", True),
}


@pytest.mark.parametrize(
    ("point", "recover"),
    [
        *((point, load_posts) for point in CRASH_POINTS),
        ("after the receipt of the files", load_by_sensors),
        ("before the load", load_by_sensors),
    ],
)
def test_a_loader_that_is_killed_at_any_point_loses_and_repeats_nothing(
    deploy: Deploy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    recover: Callable[[Deployment], None],
) -> None:
    deployment = deploy_hospital(deploy, tmp_path)
    owner, name, after = CRASH_POINTS[point]
    original = getattr(owner, name)

    def crash(*args: Any, **kwargs: Any) -> None:
        if after:
            original(*args, **kwargs)
        raise Killed

    with api_in_threads(deployment.settings) as api:
        post_visit(api, 1)
        post_patient(api, "a")
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, crash)
            with pytest.raises(Killed):
                load_posts(deployment)
        recover(deployment)
        recover(deployment)
        assert count_pending(deployment) == 0
        assert deployment.count_loaded() == {"Patient": 2, "Encounter": 1}
        assert len(api.get("/patients").json()["patients"]) == 2
    assert deployment.query("SELECT count(*) FROM fhir.patient") == [(2,)]
    assert find_faults(deployment) == []


def test_of_two_loaders_one_works_and_the_other_takes_over(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy_hospital(deploy, tmp_path)
    with api_in_threads(deployment.settings) as api, post_loader_in_thread(deployment) as first:
        with post_loader_in_thread(deployment):
            for n in range(3):
                post_visit(api, n)
            wait_until(lambda: count_pending(deployment) == 0)
            first.stop()
            post_visit(api, 3)
            wait_until(lambda: len(api.get("/patients").json()["patients"]) == 4)
    assert deployment.count_loaded() == {"Patient": 4, "Encounter": 4}


def test_two_loads_of_the_same_posts_at_once_load_them_once(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy_hospital(deploy, tmp_path)
    with api_in_threads(deployment.settings) as api:
        post_visit(api, 1)
        post_patient(api, "a")
    first, second = build_loads(deployment), build_loads(deployment)
    first.receive_files()
    for _ in first.run():
        list(second.run())
    assert deployment.count_loaded() == {"Patient": 2, "Encounter": 1}
    assert deployment.query("SELECT count(*) FROM fhir.encounter") == [(1,)]
    assert find_faults(deployment) == []


def test_posts_obey_consents_that_are_posted_before_and_after_them(deploy: Deploy, tmp_path: Path) -> None:
    settings = build_settings("Patient,Encounter,Consent", "opt-out")
    deployment = deploy_hospital(deploy, tmp_path, **settings)
    deny = {key: build_consent(f"deny-{key}", {"reference": f"Patient/{key}"}, "deny") for key in ("before", "after")}

    def post_consent(api: Api, key: str) -> None:
        body = json.dumps({"records": [deny[key]]})
        assert api.post("/api/v1/ingest", data=body, headers={"Content-Type": "application/json"}).status_code == 202

    with api_in_threads(deployment.settings) as api, post_loader_in_thread(deployment):
        post_consent(api, "before")
        post_patient(api, "before")
        post_patient(api, "after")
        post_patient(api, "other")
        wait_until(lambda: count_pending(deployment) == 0)
        assert [api.get(f"/patients/{key}").status_code for key in ("before", "after", "other")] == [403, 200, 200]
        post_consent(api, "after")
        assert api.get("/patients/after").status_code == 403
        wait_until(lambda: deployment.query("SELECT id FROM fhir.patient") == [("other",)])
    assert deployment.query("SELECT count(*) FROM ops.withheld WHERE resource_type = 'Patient'") == [(2,)]
    assert find_faults(deployment) == []


def test_posts_are_delivered_by_the_next_run_after_their_load(deploy: Deploy, tmp_path: Path) -> None:
    with SandboxServer() as source, SandboxServer() as target:
        deployment = deploy_hospital(
            deploy, tmp_path, fhir_base_url=source.url, fhir_delivery_url=target.url, fhir_resource_types=("Patient",)
        )
        with api_in_threads(deployment.settings) as api:
            post_patient(api, "old", meta={"lastUpdated": "2024-01-05T12:00:00Z"})
        load_posts(deployment)
        assert deployment.count_loaded() == {"Patient": 1}
        assert read_back(target.url, ["Patient"]) == {}
        assert deployment.query("SELECT count(*) FROM ops.held_windows") == [(1,)]
        today = datetime.now(UTC)
        assert all(outcome.success for outcome in deployment.ingest(first=today, last=today))
        assert list(read_back(target.url, ["Patient"])) == ["Patient/old"]
        assert deployment.query("SELECT count(*) FROM ops.held_windows") == [(0,)]


@pytest.mark.parametrize("reconciled", [True, False])
def test_a_post_that_is_validated_and_not_loaded_is_not_recorded_as_delivered(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reconciled: bool
) -> None:
    with SandboxServer() as source, SandboxServer() as target:
        deployment = deploy_hospital(
            deploy, tmp_path, fhir_base_url=source.url, fhir_delivery_url=target.url, fhir_resource_types=("Patient",)
        )
        build_loads(deployment).create_tables()
        today = datetime.now(UTC)

        def deliver_before_the_load(*args: Any, **kwargs: Any) -> Any:
            if reconciled:
                deployment.query("UPDATE ops.window_verdicts SET reconciled = true, faults = '' RETURNING 1")
            run = materialize(deployment, "delivered/patient", windows=["2024-01-05"])
            assert run.success
            return load_windows(*args, **kwargs)

        with api_in_threads(deployment.settings) as api:
            post_patient(api, "old", meta={"lastUpdated": "2024-01-05T12:00:00Z"})
        monkeypatch.setattr(loads, "load_windows", deliver_before_the_load)
        load_posts(deployment)
        assert deployment.count_loaded() == {"Patient": 1}
        assert read_back(target.url, ["Patient"]) == {}
        assert deployment.query("SELECT count(*) FROM ops.held_windows") == [(1,)]
        assert all(outcome.success for outcome in deployment.ingest(first=today, last=today))
        assert list(read_back(target.url, ["Patient"])) == ["Patient/old"]


def test_a_window_that_is_held_again_during_a_delivery_stays_held(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy_hospital(deploy, tmp_path)
    with Warehouse(deployment.settings).connect() as conn:
        held_windows.hold(conn, "there", "Patient", ["w1", "w2"], run_id="first")
        conn.commit()
        seen = held_windows.find_held(conn, "there", "Patient")
        held_windows.hold(conn, "there", "Patient", ["w2"], run_id="second")
        held_windows.release(conn, "there", "Patient", seen)
        assert list(held_windows.find_held(conn, "there", "Patient")) == ["w2"]


def test_a_window_from_which_posts_in_progress_are_left_out_gets_no_verdict(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy_hospital(deploy, tmp_path)
    build_loads(deployment).create_tables()
    verdicts: list[object] = []

    def evaluate() -> None:
        views = build_views(deployment.settings).views
        keys = deployment.store.partition_keys("raw", "Patient")
        with Warehouse(deployment.settings).connect() as conn:
            evaluate_windows(conn, deployment.store, "Patient", keys, main_view=find_main_view(views, "Patient"))
        verdicts.extend(verdict for (verdict,) in deployment.query("SELECT reconciled FROM ops.window_verdicts"))

    def look(*args: Any, **kwargs: Any) -> Any:
        evaluate()
        return load_windows(*args, **kwargs)

    monkeypatch.setattr(loads, "load_windows", look)
    with api_in_threads(deployment.settings) as api:
        post_patient(api, "a")
    evaluate()
    load_posts(deployment)
    evaluate()
    assert verdicts == [None, None, True]


def test_a_post_in_a_batch_with_other_files_belongs_to_the_run_that_formed_the_batch(
    deploy: Deploy, tmp_path: Path
) -> None:
    deployment = deploy_hospital(deploy, tmp_path)
    with api_in_threads(deployment.settings) as api:
        post_visit(api, 1)
        post_visit(api, 2)
    deployment.query("UPDATE ops.landing_files SET batch = 'x' RETURNING 1")
    with Warehouse(deployment.settings).connect() as conn:
        zone = conn.execute("SELECT DISTINCT zone FROM ops.landing_files").fetchall()[0][0]
        assert len(landing_files.find_posted(conn, zone, limit=10)) == 2
        conn.execute(
            "UPDATE ops.landing_files SET posted = false WHERE name = (SELECT min(name) FROM ops.landing_files)"
        )
        assert landing_files.find_posted(conn, zone, limit=10) == []


def test_a_window_reconciles_at_every_moment_of_the_load_of_a_post(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy_hospital(deploy, tmp_path)
    build_loads(deployment).create_tables()
    moments: list[list[str]] = []

    def look(*args: Any, **kwargs: Any) -> Any:
        moments.append(find_faults(deployment))
        return load_windows(*args, **kwargs)

    monkeypatch.setattr(loads, "load_windows", look)
    with api_in_threads(deployment.settings) as api:
        for key in ("a", "b"):
            post_patient(api, key)
            moments.append(find_faults(deployment))
            load_posts(deployment)
            moments.append(find_faults(deployment))
        post_patient(api, "c")
    assert moments == [[]] * 6
    monkeypatch.setattr("fhir_assets.pipeline.reconcile.posts_in_progress.GRACE", timedelta(0))
    assert find_faults(deployment) == ["raw holds 3 but 2 were validated: materialize validated again"]


def test_what_a_killed_loader_has_not_reported_is_reported_by_the_next(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy_hospital(deploy, tmp_path)
    with api_in_threads(deployment.settings) as api:
        post_patient(api, "a")
    load_posts(deployment)
    assert materialized(deployment, "normalized", "patient") == set()
    loader: PostLoader = build_post_loader(deployment)
    loader.stop()
    loader.run()
    assert len(materialized(deployment, "normalized", "patient")) == 1


def test_a_report_that_dagster_does_not_take_is_repeated(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy_hospital(deploy, tmp_path)
    original = deployment.instance.report_runless_asset_event
    calls = []

    def refuse_twice(event: Any) -> None:
        calls.append(event)
        if len(calls) <= 2:
            raise RuntimeError("Dagster's database is down")
        original(event)

    monkeypatch.setattr(deployment.instance, "report_runless_asset_event", refuse_twice)
    with api_in_threads(deployment.settings) as api, post_loader_in_thread(deployment):
        post_patient(api, "a")
        wait_until(lambda: api.get("/patients/a").status_code == 200)
        wait_until(lambda: materialized(deployment, "normalized", "patient"))


def test_the_status_says_whether_a_post_loader_runs(deploy: Deploy, tmp_path: Path) -> None:
    deployment = deploy_hospital(deploy, tmp_path)
    warehouse = Warehouse(deployment.settings)
    assert not read_status(deployment.settings, warehouse.connect_read_only).post_loader
    with reserved_lane(deployment):
        assert read_status(deployment.settings, warehouse.connect_read_only).post_loader
