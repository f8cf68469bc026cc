"""Bundles that write resources, and their responses."""

import json
from typing import Any

import pytest

from fhir_assets.fhir.bundles import (
    BundleEntry,
    EntryResult,
    build_put_bundle,
    find_references,
    has_same_content,
    parse_response_bundle,
    remove_references,
    sort_types,
)


def text(**members: Any) -> bytes:
    return json.dumps(members).encode()


def test_a_bundle_contains_the_bytes_of_a_resource_unchanged() -> None:
    body = b'{ "resourceType" : "Observation", "id":"o", "valueQuantity":{"value": 1.50}}'
    bundle = build_put_bundle("transaction", "http://s/fhir", [BundleEntry("Observation", "o", body)])
    assert body in bundle
    [entry] = json.loads(bundle)["entry"]
    assert json.loads(bundle)["type"] == "transaction"
    assert entry["request"] == {"method": "PUT", "url": "Observation/o"}
    assert entry["fullUrl"] == "http://s/fhir/Observation/o"


def test_a_response_bundle_is_parsed_entry_by_entry() -> None:
    outcome = {"resourceType": "OperationOutcome", "issue": [{"severity": "error", "code": "invalid"}]}
    answers = parse_response_bundle(
        text(
            resourceType="Bundle",
            entry=[
                {"response": {"status": "201 Created"}},
                {"response": {"status": "422", "outcome": outcome}},
                {},
            ],
        ),
        3,
    )
    assert [answer.result.status for answer in answers] == [201, 422, 0]
    assert json.loads(answers[1].result.outcome) == outcome


WARNING = {"resourceType": "OperationOutcome", "issue": [{"severity": "warning", "code": "informational"}]}
FATAL = {"resourceType": "OperationOutcome", "issue": [{"severity": "fatal", "code": "exception"}]}


@pytest.mark.parametrize(
    ("entry", "confirmed"),
    [
        ({}, False),
        ({"response": {"location": "Patient/p/_history/1"}}, True),
        ({"response": {"location": "http://s/fhir/Patient/p", "outcome": WARNING}}, True),
        ({"response": {"etag": 'W/"1"'}}, True),
        ({"resource": {"resourceType": "Patient", "id": "p"}}, True),
        ({"resource": {"resourceType": "Patient", "id": "q"}}, False),
        ({"resource": WARNING}, False),
        ({"resource": {"status": "maintenance"}}, False),
        ({"resource": FATAL, "response": {"location": "Patient/p"}}, False),
        ({"response": {"location": "Patient/p", "outcome": FATAL}}, False),
        ({"response": {"location": "Patient/pp/_history/1", "etag": 'W/"1"'}}, False),
    ],
)
def test_a_status_alone_does_not_confirm_an_entry(entry: dict[str, Any], confirmed: bool) -> None:
    body = text(resourceType="Bundle", type="batch-response", entry=[entry])
    [response] = parse_response_bundle(body, 1)
    assert response.confirms(BundleEntry("Patient", "p", b"{}")) is confirmed


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"resourceType":"OperationOutcome"}',
        b'{"resourceType":"Bundle","entry":[]}',
        b'{"resourceType":"Bundle","type":"searchset","entry":[{}]}',
        b'{"status":"maintenance"}',
    ],
)
def test_a_response_that_lacks_an_entry_is_an_error(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a Bundle"):
        parse_response_bundle(body, 1)


def test_a_reason_contains_codes_and_paths_but_no_texts() -> None:
    issue = {"code": "value", "expression": ["Patient.name"], "diagnostics": "Ada", "details": {"text": "Ada"}}
    reason = EntryResult(422, text(issue=[issue])).reason
    assert reason == "the server answered 422: value at Patient.name"
    assert EntryResult(500, b"not json").reason == "the server answered 500"


def test_transient_statuses_are_retryable_and_others_are_not() -> None:
    assert all(EntryResult(status).retryable for status in (0, 408, 409, 412, 429, 500, 502, 503, 504))
    assert not any(EntryResult(status).retryable for status in (200, 400, 401, 404, 422, 501))


def test_references_to_the_same_server_are_found_at_any_depth() -> None:
    body = text(
        resourceType="Encounter",
        subject={"reference": "Patient/p"},
        contained=[{"resourceType": "Provenance", "target": [{"reference": "Organization/o/_history/2"}]}],
        participant=[{"individual": {"reference": "#inside"}}, {"individual": {"reference": "urn:uuid:1"}}],
        partOf={"reference": "https://elsewhere.example.org/fhir/Encounter/e"},
        serviceProvider={"identifier": {"value": "Patient/no"}},
    )
    assert find_references(body) == {("Patient", "p"), ("Organization", "o")}


def test_references_are_removed_and_the_rest_is_unchanged() -> None:
    body = text(id="e", subject={"reference": "Patient/p", "display": "d"}, partOf={"reference": "Encounter/x"})
    reduced = json.loads(remove_references(body, {("Encounter", "x")}))
    assert reduced == {
        "id": "e",
        "subject": {"reference": "Patient/p", "display": "d"},
        "partOf": {"type": "Encounter"},
    }


@pytest.mark.parametrize(
    ("stored", "same"),
    [
        (b'{"b":[1],"a":1.0,"meta":{"versionId":"7","lastUpdated":"x","source":"#s"}}', True),
        (b'{"a":1.0,"b":[1]}', True),
        (b'{"a":1.00,"b":[1]}', False),
        (b'{"a":1.0,"b":[1],"c":null}', False),
        (b'{"a":1.0,"b":[1],"meta":{"tag":[{"code":"t"}]}}', False),
        (b"[", False),
    ],
)
def test_content_is_compared_digit_by_digit(stored: bytes, same: bool) -> None:
    assert has_same_content(b'{"a":1.0,"b":[1],"meta":{"versionId":"1"}}', stored) is same


def test_types_are_sorted_by_the_catalog_and_unknown_types_come_last() -> None:
    assert sort_types({"Observation", "Group", "Patient", "Basic", "Encounter"}) == [
        "Patient",
        "Encounter",
        "Observation",
        "Basic",
        "Group",
    ]
