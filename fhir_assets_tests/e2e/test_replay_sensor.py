"""The sensor ``replay_dead_letters`` requests runs for marked dead letters, each a limited number of times."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from fhir_assets.definitions import build_definitions
from fhir_assets.orchestration.tags import REPLAY_TAG
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.ops import liveness, replays
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.replays import (
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


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    with serve_invalid_genders() as server:
        yield server


@pytest.fixture
def deployment(deploy: Deploy, server: SandboxServer, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    return load_invalid_genders(deploy, server, monkeypatch)


def evaluate_sensor(deployment: Deployment, cursor: str | None = None) -> tuple[list[dg.RunRequest], str | None, str]:
    """Evaluate the replay sensor. Return its run requests, its cursor and its message."""
    repository = build_definitions(deployment.settings).get_repository_def()
    context = dg.build_sensor_context(instance=deployment.instance, repository_def=repository, cursor=cursor)
    data = repository.get_sensor_def("replay_dead_letters").evaluate_tick(context)
    return list(data.run_requests or []), data.cursor, data.skip_message or ""


def execute(deployment: Deployment, request: dg.RunRequest) -> dg.ExecuteInProcessResult:
    """Execute a requested run as the daemon does."""
    return (
        build_definitions(deployment.settings)
        .resolve_job_def("replay_dead_letters")
        .execute_in_process(
            instance=deployment.instance,
            partition_key=request.partition_key,
            tags=dict(request.tags),
            asset_selection=list(request.asset_selection or []),
            raise_on_error=False,
        )
    )


def test_the_sensor_requests_each_marked_dead_letter_once(deployment: Deployment, tmp_path: Path) -> None:
    assert evaluate_sensor(deployment)[2] == "no dead letter is marked for a replay"
    edit(tmp_path, find_dead_letter(deployment, "p1-0"))
    output = run_dead_letters("replay", "--window", "2024-01-06", "--no-wait")
    assert (output["dead_letters"], output["marked"], output["runs"]) == (3, True, [])
    (request,), cursor, _ = evaluate_sensor(deployment)
    assert request.partition_key == "2024-01-06"
    assert (request.run_key or "").endswith("/attempt 1")
    assert request.tags[REPLAY_TAG] == "marked"
    assert execute(deployment, request).success
    assert {entry.status for entry in find_dead_letters(deployment, partition_keys=["2024-01-06"])} == {
        "resolved",
        "open",
    }
    assert find_dead_letter(deployment, "p1-0").status == "resolved"
    assert evaluate_sensor(deployment, cursor) == ([], "{}", "no dead letter is marked for a replay")
    assert reconcile(deployment, "2024-01-06")


def test_marks_of_windows_and_types_that_the_settings_no_longer_include_are_cancelled(deployment: Deployment) -> None:
    ids = [entry.id for entry in find_dead_letters(deployment)]
    with connect(deployment.url, autocommit=True) as conn:
        assert replays.request_replay(conn, Selection()) == len(ids)
    deployment.query("UPDATE ops.dead_letters SET partition_key = '2024-01-05-03:00' WHERE id = %s RETURNING 1", ids[0])
    deployment.query("UPDATE ops.dead_letters SET resource_type = 'Device' WHERE id = %s RETURNING 1", ids[1])
    requests, _, _ = evaluate_sensor(deployment)
    assert [next(iter(request.asset_selection or [])).path[-1] for request in requests] == ["patient"]
    assert {entry.id for entry in find_dead_letters(deployment, status="open")} == set(ids[:2])
    with connect(deployment.url, autocommit=True) as conn:
        replays.cancel_requests(conn, ["Patient"], [KEY, "2024-01-06"])
        replays.request_replay(conn, Selection(ids=ids[:2]))
    requests, _, message = evaluate_sensor(deployment)
    assert requests == []
    assert message.startswith("2 replays are cancelled, because FHIR_RESOURCE_TYPES or FHIR_PARTITION")
    marked = run_dead_letters("replay", "--window", "2024-01-05-03:00", "--no-wait")
    assert (marked["dead_letters"], marked["runs"]) == (0, [])
    assert deployment.ingestion().replay(Selection(ids=ids[:2]), triggered_by="test") == []


@pytest.mark.slow
def test_a_failed_replay_is_requested_again_a_limited_number_of_times(deployment: Deployment) -> None:
    run_dead_letters("replay", "--window", KEY, "--no-wait")
    keys = []
    cursor = None
    for _ in range(3):
        (request,), cursor, _ = evaluate_sensor(deployment, cursor)
        keys.append(request.run_key)
    assert [str(key)[-1] for key in keys] == ["1", "2", "3"]
    requests, cursor, output = evaluate_sensor(deployment, cursor)
    assert (requests, cursor) == ([], "{}")
    assert "3 replays of 2024-01-05 to 2024-01-05 are cancelled" in output
    assert {entry.status for entry in find_dead_letters(deployment)} == {"open"}


def test_a_replay_that_died_after_its_commit_is_not_repeated(deployment: Deployment, tmp_path: Path) -> None:
    """Simulate a run that died between the commit of the validated partition and the load."""
    edit(tmp_path, find_dead_letter(deployment, "p0-0"))
    with connect(deployment.url, autocommit=True) as process:
        liveness.hold_liveness_lock(process, "dead")
        replays.request_replay(process, Selection(partition_keys=[KEY]), claimed_by="dead")
    job = build_definitions(deployment.settings).resolve_job_def("replay_dead_letters")
    only_validated = job.execute_in_process(
        instance=deployment.instance,
        partition_key=KEY,
        tags={REPLAY_TAG: "marked"},
        asset_selection=[dg.AssetKey(["validated", "patient"])],
        raise_on_error=False,
    )
    assert only_validated.success
    before = deployment.store.manifest("validated", "Patient", KEY)
    assert before
    assert before.rows == 8
    assert find_dead_letter(deployment, "p0-0").status == "replaying"
    (request,), _, _ = evaluate_sensor(deployment)
    assert execute(deployment, request).success
    after = deployment.store.manifest("validated", "Patient", KEY)
    assert after
    assert after.rows == 8
    assert find_dead_letter(deployment, "p0-0").status == "resolved"
    assert count_genders(deployment) == {"male": 14, "female": 1}
    assert reconcile(deployment, KEY)


@pytest.mark.slow
def test_after_an_upgrade_the_sensor_reports_dead_letters_that_now_validate_and_replays_them_if_configured(
    deploy: Deploy, deployment: Deployment
) -> None:
    assert evaluate_sensor(deployment)[2] == "no dead letter is marked for a replay"
    lenient = deploy(
        fhir_base_url=deployment.settings.fhir_base_url,
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-01",
        validation_warn_rules="required-binding:Patient.gender",
    )
    requests, _, output = evaluate_sensor(lenient)
    assert requests == []
    assert output.startswith("6 open dead letters failed under earlier rules or views")
    replaying = deploy(
        fhir_base_url=deployment.settings.fhir_base_url,
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-01",
        validation_warn_rules="required-binding:Patient.gender",
        replay_after_upgrade=True,
    )
    (request,), _, _ = evaluate_sensor(replaying)
    assert execute(replaying, request).success
    assert {entry.resolution for entry in find_dead_letters(deployment)} == {"replayed"}
    assert deployment.count_loaded() == {"Patient": 20}
    assert reconcile(deployment, KEY, "2024-01-06")
