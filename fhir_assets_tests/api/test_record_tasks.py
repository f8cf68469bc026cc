"""The task of posted records, and the audit records of posts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.privacy.keys import new_key
from fhir_assets.warehouse.ops import audit_log, dead_letters, retention
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets_tests.support.api import TOKENS, Api, api_in_threads
from fhir_assets_tests.support.consent_forms import build_settings
from fhir_assets_tests.support.deployment import Deploy, Deployment, deploy
from fhir_assets_tests.support.landing import load_received
from fhir_assets_tests.support.posts import build_visit

__all__ = ["deploy"]

Clinic = tuple[Api, Deployment]


@pytest.fixture
def clinic(deploy: Deploy, tmp_path: Path) -> Iterator[Clinic]:
    """A deployment that withholds the resources of patients who deny, without a post loader, and its API."""
    (tmp_path / "landing").mkdir()
    deployment = deploy(
        fhir_landing_url=str(tmp_path / "landing"),
        api_tokens=TOKENS,
        phi_encryption_keys=new_key(),
        **build_settings("Patient,Encounter,Observation,Organization,Consent", "opt-out"),
    )
    with api_in_threads(deployment.settings) as api:
        yield api, deployment


def post(api: Api, *records: dict[str, Any], **more: Any) -> dict[str, Any]:
    answer = api.post("/api/v1/ingest", json={"records": list(records)}, **more)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def get_task(api: Api, task_id: str) -> dict[str, Any]:
    answer = api.get(f"/ingest/tasks/{task_id}", role="ingester")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def observation(key: str, patient: str | None) -> dict[str, Any]:
    subject = {"subject": {"reference": patient}} if patient else {}
    return {"resourceType": "Observation", "id": key, "status": "final", "code": {"text": "x"}, **subject}


def list_audited(deployment: Deployment, about: str | None = None) -> list[tuple[str, str | None, int]]:
    """Return the action, type and count of each audit record of posts, oldest first."""
    with Warehouse(deployment.settings).connect() as conn:
        subject = audit_log.hash_subject(conn, *about.split("/")) if about else None
        records = [entry.audit_record for entry in audit_log.find_latest(conn, limit=100, about=subject)]
    return [
        (record.action, record.resource_type, record.count)
        for record in reversed(records)
        if record.actor.startswith("api:") and record.action in ("create", "update")
    ]


def test_the_task_of_a_post_says_what_is_loaded_and_what_consent_withholds(clinic: Clinic) -> None:
    api, deployment = clinic
    denied = {"resourceType": "Patient", "mrn": "1", "consent": {"data_sharing": False}}
    invalid = {"resourceType": "Patient", "gender": "x"}
    content = post(api, denied, {"resourceType": "Patient", "id": "b"}, observation("o", "Patient/b"), invalid)
    task = get_task(api, content["task_id"])
    expected = {"records_received": 4, "records_rejected": 1, "resources": 4}
    assert {name: task[name] for name in expected} == expected
    unknown = dict.fromkeys(("loaded", "withheld", "dead_letters"))
    assert (task["status"], {name: task[name] for name in unknown}) == ("received", unknown)
    assert load_received(deployment) == []
    task = get_task(api, content["task_id"])
    # The denied Patient and the Consent about it.
    known = {"status": "loaded", "loaded": 2, "withheld": 2, "dead_letters": 0, **expected}
    assert {name: task[name] for name in known} == known
    assert len(task["run_ids"]) >= 1
    # A withheld Patient is known, too.
    post(api, denied)
    assert list_audited(deployment, f"Patient/{content['results'][0]['id']}") == [
        *(("create", "Consent", 1), ("create", "Patient", 1), ("update", "Consent", 1), ("update", "Patient", 1)),
    ]


def test_a_repeated_request_has_the_same_task_and_each_simultaneous_post_its_own(clinic: Clinic) -> None:
    api, _ = clinic
    body = {"resourceType": "Patient", "id": "a"}
    first, again = (post(api, body, headers={"Idempotency-Key": "k"}) for _ in range(2))
    other = post(api, body)
    assert first["task_id"] == again["task_id"] != other["task_id"]
    assert get_task(api, other["task_id"])["resources"] == 1


def test_a_post_of_which_nothing_is_accepted_has_no_task(clinic: Clinic) -> None:
    api, deployment = clinic
    answer = api.post("/api/v1/ingest", json={"records": [{"resourceType": "Patient", "gender": "x"}]})
    assert (answer.status_code, answer.json()["task_id"]) == (422, None)
    assert post(api)["task_id"] is None
    assert api.get("/ingest/tasks/records-unknown").status_code == 404
    assert deployment.query("SELECT FROM ops.record_posts") == []


def test_the_task_of_a_bundle_says_what_is_loaded(clinic: Clinic) -> None:
    api, deployment = clinic
    entries = [
        {"resource": resource} for resource in (observation("o", None), {"resourceType": "Patient", "gender": "x"})
    ]
    bundle = {"resourceType": "Bundle", "type": "batch", "entry": entries}
    answer = api.post("/fhir", json=bundle)
    assert (answer.status_code, answer.json()["id"]) == (200, answer.headers["X-Task-Id"])
    expected = {"status": "received", "records_received": 2, "records_rejected": 1, "resources": 1, "loaded": None}
    task = get_task(api, answer.headers["X-Task-Id"])
    assert {name: task[name] for name in expected} == expected
    assert load_received(deployment) == []
    task = get_task(api, answer.headers["X-Task-Id"])
    assert (task["status"], task["loaded"]) == ("loaded", 1)
    for rejected in ({**bundle, "type": "transaction"}, {"resourceType": "Bundle", "type": "batch"}):
        answer = api.post("/fhir", json=rejected)
        assert "X-Task-Id" not in answer.headers
        assert "id" not in answer.json()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/fhir", {"resourceType": "Patient", "id": "a"}),
        ("/api/v1/ingest", {"records": [{"resourceType": "Patient", "id": "a"}]}),
        ("/ingest", [build_visit(1)]),
    ],
)
def test_the_answer_of_every_post_has_its_task_in_a_header(clinic: Clinic, path: str, body: Any) -> None:
    api, _ = clinic
    first, again = (api.post(path, json=body, headers={"Idempotency-Key": "k"}) for _ in range(2))
    other = api.post(path, json=body)
    tasks = [answer.headers["X-Task-Id"] for answer in (first, again, other)]
    assert tasks[0] == tasks[1] != tasks[2]
    for task, answer in zip(tasks, (first, again, other), strict=True):
        assert task == answer.json()["id" if path == "/fhir" else "task_id"]
        assert get_task(api, task)["records_received"] == 1


def test_a_resource_that_becomes_a_dead_letter_later_is_counted_in_the_task(clinic: Clinic) -> None:
    api, deployment = clinic
    task_id = post(api, {"resourceType": "Patient", "id": "a"}, {"resourceType": "Patient", "id": "b"})["task_id"]
    assert load_received(deployment) == []
    deployment.query("DELETE FROM fhir.resource WHERE id = 'b' RETURNING 1")
    with Warehouse(deployment.settings).connect() as conn:
        dead_letters.record(conn, "run", [DeadLetter("Patient", "b", "load", "rule", "Patient", "", None, "2024-01")])
    task = get_task(api, task_id)
    assert (task["loaded"], task["dead_letters"]) == (1, 1)


def test_posts_of_known_resources_are_audited_as_updates_of_their_patients(clinic: Clinic) -> None:
    api, deployment = clinic
    patient = {"resourceType": "Patient", "id": "p"}
    organization = {"resourceType": "Organization", "id": "o", "name": "Ward"}
    post(api, patient, patient, observation("1", "Patient/p"), observation("2", "Patient/p"), organization)
    created = [("create", "Observation", 2), ("create", "Patient", 1), ("update", "Patient", 1)]
    assert list_audited(deployment, "Patient/p") == created
    assert list_audited(deployment, "Organization/o") == [("create", "Organization", 1)]
    # Not loaded yet: known by the earlier post.
    assert api.post("/fhir", json=observation("1", "Patient/p")).status_code == 200
    assert list_audited(deployment, "Patient/p") == [*created, ("update", "Observation", 1)]
    assert load_received(deployment) == []
    post(api, {**patient, "active": True}, observation("3", None))
    assert list_audited(deployment, "Patient/p")[-1] == ("update", "Patient", 1)
    assert list_audited(deployment, "Observation/3") == [("create", "Observation", 1)]


def test_posted_visits_are_audited_about_their_patients(clinic: Clinic) -> None:
    api, deployment = clinic
    with Warehouse(deployment.settings).connect() as conn:
        known = post(api, {"resourceType": "Patient", "mrn": "MRN-1"})["results"][0]["id"]
        assert audit_log.hash_subject(conn, "Patient", known) not in ("MRN-1", known)
    visits = [build_visit(1), build_visit(1, visit_account_number="V-9"), build_visit(2)]
    assert api.post("/ingest", json=visits).status_code == 202
    assert list_audited(deployment, f"Patient/{known}") == [
        *(("create", "Patient", 1), ("create", "Encounter", 2), ("update", "Patient", 1)),
    ]
    assert sorted(list_audited(deployment)[1:]) == [
        *(("create", "Encounter", 1), ("create", "Encounter", 2), ("create", "Patient", 1), ("update", "Patient", 1)),
    ]
    in_one_transaction = "SELECT count(*) FROM ops.visit_posts p JOIN ops.audit_log a ON a.xmin::text = p.xmin::text"
    assert deployment.query(in_one_transaction) == [(4,)]


def test_old_tasks_are_pruned_with_their_resources(clinic: Clinic) -> None:
    api, deployment = clinic
    old, new = (post(api, {"resourceType": "Patient", "id": key})["task_id"] for key in "ab")
    deployment.query(
        "UPDATE ops.record_posts SET posted_at = posted_at - interval '1 year' WHERE task_id = %s RETURNING 1", old
    )
    ((before,),) = deployment.query("SELECT now() - interval '1 month'")
    with Warehouse(deployment.settings).connect() as conn:
        conn.autocommit = True
        assert retention.count_expired_rows(conn, "record_posts", before) == 1
        assert retention.delete_expired_rows(conn, "record_posts", before) == 1
    assert deployment.query("SELECT task_id FROM ops.posted_resources") == [(new,)]
    assert api.get(f"/ingest/tasks/{old}").status_code == 404
