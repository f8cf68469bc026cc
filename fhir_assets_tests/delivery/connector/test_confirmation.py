"""The connector does not believe a status alone: what the answers to its updates and deletions must say."""

import json
from collections.abc import Iterable

import pytest

from fhir_assets_tests.support.hospital import Hospital
from fhir_assets_tests.support.patient_server import PatientServer
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, reply
from fhir_assets_tests.support.ward import Ward


def outcome(severity: str) -> dict[str, object]:
    return {"resourceType": "OperationOutcome", "issue": [{"severity": severity, "code": "processing"}]}


DOUBTFUL = {
    "no-resource": reply({"status": "maintenance"}),
    "error": reply(outcome("error")),
    "located-error": reply(outcome("fatal"), Location="http://s/fhir/Patient/made-1/_history/1"),
    "no-issues": reply({"resourceType": "OperationOutcome"}, ETag='W/"1"'),
    "bundle": reply({"resourceType": "Bundle", "type": "batch-response"}),
    "another-resource": reply({"resourceType": "Patient", "id": "another"}),
    "list": reply([]),
    "html": Reply(b"<html>", headers={"Content-Type": "text/html"}),
    "not-yet": reply(b"", 202),
}
"""Answers by the identifier of the Patient that gets them: none confirms an update or a deletion."""

SILENT = {"empty": reply(b"", 204), "warning": reply(outcome("warning"))}
"""Answers that confirm a deletion, but no update: they name neither a Location nor an ETag."""

ANSWERS = DOUBTFUL | SILENT


CREATIONS = [("POST", False), ("PUT", True)]
"""The method that creates a resource, and whether foreign ones may be taken over."""


class Doubtful(Ward):
    """A ward whose server answers requests of one method with ``ANSWERS``, executed or not."""

    def admit_all(self, mrns: Iterable[str]) -> None:
        for mrn in mrns:
            self.admit(mrn)

    def answer(self, method: str, *, executed: bool) -> None:
        """Answer requests of ``method`` by the identifier of their Patient, after executing them or not."""

        def intercept(request: ReceivedRequest) -> Reply | None:
            if request.method != method:
                return None
            resource = json.loads(request.body) if request.body else self.server.patients[request.path.split("/")[-1]]
            if executed:
                self.server.execute(request)
            return ANSWERS[resource["identifier"][0]["value"]]

        self.server.intercept = intercept

    def acknowledged(self) -> int:
        return int(self.hospital.execute("SELECT count(*) FROM health.fhir_processed_event")[0][0])


@pytest.fixture
def doubtful(hospital: Hospital, server: PatientServer) -> Doubtful:
    return Doubtful(hospital, server)


@pytest.mark.parametrize(("method", "take_over"), CREATIONS)
def test_a_creation_that_was_not_executed_is_not_acknowledged(doubtful: Doubtful, method: str, take_over: bool) -> None:
    doubtful.answer(method, executed=False)
    doubtful.admit_all(ANSWERS)
    doubtful.deliver(connector_max_attempts=2, connector_take_over=take_over)
    assert doubtful.reasons() == ["attempts-used-up"] * len(ANSWERS)
    assert doubtful.acknowledged() == 0
    doubtful.server.intercept = lambda request: None
    doubtful.rename()
    doubtful.deliver()
    assert set(doubtful.server.identifiers().values()) == set(ANSWERS)
    assert doubtful.reasons() == []


@pytest.mark.parametrize(("method", "take_over"), CREATIONS)
def test_a_creation_that_was_executed_is_read_back_and_not_sent_again(
    doubtful: Doubtful, method: str, take_over: bool
) -> None:
    doubtful.answer(method, executed=True)
    doubtful.admit_all(ANSWERS)
    doubtful.deliver(connector_take_over=take_over)
    assert doubtful.server.count(method) == len(ANSWERS)
    delivered = doubtful.hospital.execute("SELECT resource_id FROM health.fhir_delivered")
    assert {resource_id for (resource_id,) in delivered} == set(doubtful.server.patients)
    assert doubtful.reasons() == []


def test_a_deletion_that_was_not_executed_is_not_acknowledged(doubtful: Doubtful) -> None:
    doubtful.admit_all(DOUBTFUL)
    doubtful.deliver()
    doubtful.answer("DELETE", executed=False)
    doubtful.discharge()
    doubtful.deliver(connector_max_attempts=2)
    assert set(doubtful.server.identifiers().values()) == set(DOUBTFUL)
    assert doubtful.reasons() == ["attempts-used-up"] * len(DOUBTFUL)


def test_a_deletion_that_was_executed_is_not_sent_again(doubtful: Doubtful) -> None:
    doubtful.admit_all(ANSWERS)
    doubtful.deliver()
    doubtful.answer("DELETE", executed=True)
    doubtful.discharge()
    doubtful.deliver()
    assert doubtful.server.count("DELETE") == len(ANSWERS)
    assert doubtful.reasons() == []


def test_a_search_without_an_answer_in_fhir_is_not_believed(doubtful: Doubtful) -> None:
    def answer(request: ReceivedRequest) -> Reply | None:
        return ANSWERS[request.all("identifier")[0].split("|")[-1]] if request.method == "GET" else None

    doubtful.server.intercept = answer
    doubtful.admit_all(ANSWERS)
    doubtful.deliver(connector_max_attempts=2)
    assert doubtful.server.count("POST") == 0
    assert doubtful.reasons() == ["attempts-used-up"] * len(ANSWERS)


@pytest.mark.parametrize("body", [b"", json.dumps(outcome("information")).encode()])
def test_an_empty_answer_with_a_location_is_a_success(doubtful: Doubtful, body: bytes) -> None:
    def locate(request: ReceivedRequest) -> Reply | None:
        if request.method != "POST":
            return None
        location = doubtful.server.execute(request).headers["Location"]
        return Reply(body, 201, {"Location": location})

    doubtful.server.intercept = locate
    doubtful.admit("1")
    doubtful.deliver()
    assert doubtful.server.methods() == ["GET", "POST"]
    [delivered] = doubtful.hospital.execute("SELECT resource_id, version_id FROM health.fhir_delivered")
    assert delivered == (*doubtful.server.patients, "1")


def test_an_empty_answer_with_an_etag_is_a_success_whose_id_is_looked_up(doubtful: Doubtful) -> None:
    def tag(request: ReceivedRequest) -> Reply | None:
        if request.method != "POST":
            return None
        doubtful.server.execute(request)
        return Reply(b"", 200, {"ETag": 'W/"1"'})

    doubtful.server.intercept = tag
    doubtful.admit("1")
    doubtful.deliver()
    assert doubtful.hospital.execute("SELECT resource_id FROM health.fhir_delivered") == [
        tuple(doubtful.server.patients)
    ]
    doubtful.rename()
    doubtful.deliver()
    assert list(doubtful.server.families().values()) == ["Changed"]
    assert doubtful.server.methods() == ["GET", "POST", "GET", "PUT"]
