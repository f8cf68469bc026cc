"""Writing to the sandbox server: versions, conditions, deletions, Bundles."""

from typing import Any

import orjson
import requests

from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.sandbox_observations import observation

PATIENT = b'{"resourceType":"Patient","id":"p","identifier":[{"system":"urn:mrn","value":"7"}],"x":1.50}'


def call(
    server: SandboxServer, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> requests.Response:
    return requests.request(method, f"{server.url}/{path}", data=body, headers=headers, timeout=10)


def entry(method: str, url: str, resource: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    bundle_entry: dict[str, Any] = {"request": {"method": method, "url": url}, **more}
    return bundle_entry if resource is None else {**bundle_entry, "resource": resource}


def post(server: SandboxServer, kind: str, *entries: dict[str, Any]) -> requests.Response:
    bundle = {"resourceType": "Bundle", "type": kind, "entry": entries}
    return call(server, "POST", "", orjson.dumps(bundle))


def statuses(answer: requests.Response) -> list[str]:
    return [e["response"]["status"][:3] for e in answer.json()["entry"]]


def test_a_put_creates_then_updates_and_keeps_decimal_precision(empty: SandboxServer) -> None:
    first = call(empty, "PUT", "Patient/p", PATIENT)
    assert (first.status_code, first.headers["ETag"]) == (201, 'W/"1"')
    second = call(empty, "PUT", "Patient/p", PATIENT.replace(b"1.50", b"2.50"))
    assert (second.status_code, second.headers["ETag"]) == (200, 'W/"2"')
    now = call(empty, "GET", "Patient/p")
    assert b'"x":2.50' in now.content
    assert now.json()["meta"]["versionId"] == "2"
    assert b'"x":1.50' in call(empty, "GET", "Patient/p/_history/1").content
    assert now.json()["meta"]["lastUpdated"] > first.json()["meta"]["lastUpdated"]


def test_a_written_resource_is_found_in_its_window_and_by_its_parameters(empty: SandboxServer) -> None:
    assert call(empty, "GET", "Patient?identifier=urn:mrn|7").json()["total"] == 0
    when = call(empty, "PUT", "Patient/p", PATIENT).json()["meta"]["lastUpdated"]
    assert call(empty, "GET", "Patient?identifier=urn:mrn|7").json()["total"] == 1
    assert call(empty, "GET", f"Patient?_lastUpdated=ge{when}").json()["total"] == 1
    call(empty, "PUT", "Patient/p", PATIENT.replace(b'"7"', b'"8"'))
    assert call(empty, "GET", "Patient?identifier=urn:mrn|7").json()["total"] == 0
    assert call(empty, "GET", "Patient?_summary=count").json()["total"] == 1


def test_the_meta_that_a_client_sends_is_kept_except_version_and_time(empty: SandboxServer) -> None:
    body = b'{"resourceType":"Patient","meta":{"profile":["http://p"],"versionId":"99"},"id":"p"}'
    meta = call(empty, "PUT", "Patient/p", body).json()["meta"]
    assert (meta["profile"], meta["versionId"]) == (["http://p"], "1")


def test_a_body_that_does_not_match_the_url_or_is_not_a_resource_is_refused(empty: SandboxServer) -> None:
    refused = {
        "Patient/q": PATIENT,
        "Observation/p": PATIENT,
        "Patient/p": b"not json",
        "Patient/a%20b": b'{"resourceType":"Patient","id":"a b"}',
    }
    for path, body in refused.items():
        answer = call(empty, "PUT", path, body)
        assert (answer.status_code, answer.json()["resourceType"]) == (400, "OperationOutcome"), path


def test_an_update_with_an_outdated_if_match_version_is_refused(empty: SandboxServer) -> None:
    call(empty, "PUT", "Patient/p", PATIENT)
    assert call(empty, "PUT", "Patient/p", PATIENT, headers={"If-Match": 'W/"4"'}).status_code == 412
    assert call(empty, "PUT", "Patient/p", PATIENT, headers={"If-Match": 'W/"1"'}).status_code == 200


def test_a_deletion_with_an_outdated_if_match_version_is_refused(empty: SandboxServer) -> None:
    call(empty, "PUT", "Patient/p", PATIENT)
    assert call(empty, "DELETE", "Patient/p", headers={"If-Match": 'W/"4"'}).status_code == 412
    assert call(empty, "DELETE", "Patient/p", headers={"If-Match": 'W/"1"'}).status_code == 204


def test_a_conditional_update_creates_updates_and_refuses_several(empty: SandboxServer) -> None:
    anonymous = PATIENT.replace(b'"id":"p",', b"")
    condition = "Patient?identifier=urn:mrn|7"
    created = call(empty, "PUT", condition, anonymous)
    assert created.status_code == 201
    again = call(empty, "PUT", condition, anonymous)
    assert (again.status_code, again.json()["id"]) == (200, created.json()["id"])
    call(empty, "PUT", "Patient/p", PATIENT)
    assert call(empty, "PUT", condition, anonymous).status_code == 412
    assert call(empty, "PUT", "Patient?colour=blue", anonymous).status_code == 400


def test_a_conditional_create_returns_the_existing_resource(empty: SandboxServer) -> None:
    call(empty, "PUT", "Patient/p", PATIENT)
    answer = call(empty, "POST", "Patient", PATIENT, headers={"If-None-Exist": "identifier=urn:mrn|7"})
    assert (answer.status_code, answer.json()["id"]) == (200, "p")
    assert call(empty, "POST", "Patient", PATIENT).status_code == 201


def test_a_deleted_resource_is_gone_and_can_be_created_again(empty: SandboxServer) -> None:
    call(empty, "PUT", "Patient/p", PATIENT)
    assert call(empty, "DELETE", "Patient/p").status_code == 204
    assert call(empty, "DELETE", "Patient/p").status_code == 204
    assert call(empty, "GET", "Patient/p").status_code == 410
    assert call(empty, "GET", "Patient").json()["total"] == 0
    history = call(empty, "GET", "Patient/p/_history").json()["entry"]
    assert [e["request"]["method"] for e in history] == ["DELETE", "POST"]
    assert call(empty, "PUT", "Patient/p", PATIENT).status_code == 201
    assert call(empty, "GET", "Patient/p").json()["meta"]["versionId"] == "3"


def test_a_conditional_delete_removes_the_single_match(empty: SandboxServer) -> None:
    call(empty, "PUT", "Patient/p", PATIENT)
    assert call(empty, "DELETE", "Patient?identifier=nobody").status_code == 204
    assert call(empty, "GET", "Patient/p").status_code == 200
    assert call(empty, "DELETE", "Patient?identifier=urn:mrn|7").status_code == 204
    assert call(empty, "GET", "Patient/p").status_code == 410


def test_the_history_since_a_time_lists_changes_and_deletions(empty: SandboxServer) -> None:
    call(empty, "PUT", "Patient/p", PATIENT)
    when = call(empty, "PUT", "Patient/p", PATIENT).json()["meta"]["lastUpdated"]
    call(empty, "DELETE", "Patient/p")
    for path in ("_history", "Patient/_history"):
        bundle = call(empty, "GET", f"{path}?_since={when}&_count=1").json()
        assert bundle["total"] == 2
        assert bundle["entry"][0]["request"] == {"method": "DELETE", "url": "Patient/p"}


def test_a_read_of_a_known_version_is_not_modified(empty: SandboxServer) -> None:
    call(empty, "PUT", "Patient/p", PATIENT)
    assert call(empty, "GET", "Patient/p", headers={"If-None-Match": 'W/"1"'}).status_code == 304
    assert call(empty, "GET", "Patient/p", headers={"If-None-Match": 'W/"0"'}).status_code == 200


def test_a_batch_processes_each_entry_independently_and_in_order(empty: SandboxServer) -> None:
    answer = post(
        empty,
        "batch",
        entry("PUT", "Patient/a", {"resourceType": "Patient", "id": "a"}),
        entry("PUT", "Patient/b", {"resourceType": "Patient", "id": "other"}),
        entry("GET", "Patient/a"),
        entry("GET", "Patient?_id=a"),
        entry("PATCH", "Patient/a"),
        entry("POST", "Patient", {"resourceType": "Patient"}),
        entry("DELETE", "Patient/a"),
    )
    assert statuses(answer) == ["201", "400", "200", "200", "400", "201", "204"]
    entries = answer.json()["entry"]
    assert entries[0]["response"]["location"] == "Patient/a/_history/1"
    assert entries[1]["response"]["outcome"]["resourceType"] == "OperationOutcome"
    assert entries[3]["resource"]["total"] == 1


def test_a_transaction_resolves_references_to_the_resources_that_it_creates(empty: SandboxServer) -> None:
    subject = {"reference": "urn:uuid:1"}
    answer = post(
        empty,
        "transaction",
        entry("PUT", "Observation/o", {"resourceType": "Observation", "id": "o", "subject": subject}),
        entry("POST", "Patient", {"resourceType": "Patient"}, fullUrl="urn:uuid:1"),
    )
    assert statuses(answer) == ["201", "201"]
    place = answer.json()["entry"][1]["response"]["location"].split("/_history")[0]
    assert call(empty, "GET", "Observation/o").json()["subject"] == {"reference": place}
    assert call(empty, "GET", place).status_code == 200


def test_a_failed_transaction_changes_nothing(empty: SandboxServer) -> None:
    call(empty, "PUT", "Patient/p", PATIENT)
    call(empty, "GET", "Patient?identifier=urn:mrn|7")
    answer = post(
        empty,
        "transaction",
        entry("DELETE", "Patient/p"),
        entry("PUT", "Patient/a", {"resourceType": "Patient", "id": "a"}),
        entry("PUT", "Patient/b", {"resourceType": "Patient", "id": "other"}),
    )
    assert answer.status_code == 400
    assert call(empty, "GET", "Patient/p").json()["meta"]["versionId"] == "1"
    assert call(empty, "GET", "Patient/a").status_code == 404
    assert call(empty, "GET", "Patient?identifier=urn:mrn|7").json()["total"] == 1
    assert call(empty, "GET", "Patient?_lastUpdated=ge2000").json()["total"] == 1


def test_referential_integrity_refuses_a_dangling_reference_until_its_target_exists() -> None:
    body = observation(1, "2024-01-01T00:00:00Z", "p")
    with SandboxServer(referential_integrity=True) as server:
        assert call(server, "PUT", "Observation/o1", body).status_code == 422
        call(server, "PUT", "Patient/p", PATIENT)
        assert call(server, "PUT", "Observation/o1", body).status_code == 201
