"""A deletion that the server refuses because other resources refer to the resource."""

import json
import logging
from collections.abc import Callable

import pytest

from fhir_assets_tests.support.hospital import MRN
from fhir_assets_tests.support.patient_server import PatientServer
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, reply
from fhir_assets_tests.support.ward import Ward

SECRET = "Xanthippe"
REFUSAL = {
    "resourceType": "OperationOutcome",
    "issue": [
        {
            "severity": "error",
            "code": "conflict",
            "diagnostics": f"Unable to delete Patient/1 ({SECRET}) because at least one resource has a reference to "
            "this resource. First reference found was resource Observation/7 in path Observation.subject",
        }
    ],
}


def answer_deletions(server: PatientServer, choose: Callable[[int], Reply | None]) -> list[str]:
    """Answer the deletions of a server. ``choose`` gets the number of each; None lets the server execute it.

    Return the paths of the deletions that arrive.
    """
    arrived: list[str] = []

    def intercept(request: ReceivedRequest) -> Reply | None:
        if request.method != "DELETE":
            return None
        arrived.append(request.path)
        return choose(len(arrived))

    server.intercept = intercept
    return arrived


def test_it_is_a_dead_letter_after_five_attempts_and_names_what_refers_to_the_resource(ward: Ward) -> None:
    ward.admit("1")
    ward.deliver()
    arrived = answer_deletions(ward.server, lambda _: reply(REFUSAL, 409))
    ward.discharge()
    ward.deliver(connector_max_attempts=20)
    assert len(arrived) == 5
    [(reason, status, message)] = ward.hospital.execute("SELECT reason, http_status, message FROM health.fhir_dlq")
    assert (reason, status) == ("still-referenced", 409)
    assert "conflict at Observation.subject" in message
    assert SECRET not in message
    assert ward.server.families() == {"made-1": "Ours"}


def test_it_is_deleted_if_what_referred_to_it_is_deleted_soon(ward: Ward) -> None:
    ward.admit("1")
    ward.deliver()
    arrived = answer_deletions(ward.server, lambda number: reply(REFUSAL, 409) if number <= 3 else None)
    ward.discharge()
    ward.deliver()
    assert len(arrived) == 4
    assert ward.server.families() == {}
    assert ward.reasons() == []


def test_a_conflict_that_names_no_element_is_tried_ten_times(ward: Ward) -> None:
    """HAPI answers so if another request has changed the resource in the meantime."""
    ward.admit("1")
    ward.deliver()
    arrived = answer_deletions(ward.server, lambda _: reply(b"", 409))
    ward.discharge()
    ward.deliver()
    assert len(arrived) == 10
    assert ward.reasons() == ["still-referenced"]


def test_attempts_while_the_server_was_away_do_not_count(ward: Ward) -> None:
    ward.admit("1")
    ward.deliver()

    def choose(number: int) -> Reply | None:
        if number <= 6:
            return reply(b"", 503)
        return reply(REFUSAL, 409) if number <= 8 else None

    arrived = answer_deletions(ward.server, choose)
    ward.discharge()
    ward.deliver()
    assert len(arrived) == 9
    assert ward.reasons() == []
    assert ward.server.families() == {}


def test_each_delivery_and_each_call_is_a_line_of_the_log_without_values(
    ward: Ward, caplog: pytest.LogCaptureFixture
) -> None:
    ward.server.creates_conditionally = False
    ward.admit("mrn-4711", SECRET)
    with caplog.at_level(logging.INFO, logger="fhir_assets.delivery.connector"):
        ward.deliver()
    lines = [record.__dict__ for record in caplog.records]
    [delivered] = [line for line in lines if line["message"] == "delivered"]
    assert delivered["worker_id"].startswith("connector-")
    [(txid,)] = ward.hospital.execute("SELECT txid::text FROM health.fhir_processed_event")
    assert (delivered["txid"], delivered["fhirId"], delivered["outcome"]) == ([txid], "made-1", "created")
    calls = [(line["call"], line["result"]) for line in lines if line["message"] == "called the FHIR server"]
    assert ("PUT Patient?identifier=…", 201) in calls
    text = json.dumps(lines, default=str)
    assert not any(value in text for value in (SECRET, "mrn-4711", MRN))
