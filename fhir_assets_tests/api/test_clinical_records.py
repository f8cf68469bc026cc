"""Short clinical records that are posted, and the FHIR resources that they become."""

from typing import Any

import orjson
import pytest

from fhir_assets.deployment.store import build_store
from fhir_assets_tests.support.api import Api, Serve

ASTHMA = {"resourceType": "Condition", "mrn": "SECRET-MRN-1", "code": "Asthma", "date": "2024-01-30"}
PENICILLIN = {"system": "http://snomed.info/sct", "code": "764146007", "display": "Penicillin"}


TYPES = "Patient,AllergyIntolerance,Condition,Immunization,MedicationRequest,Procedure"


@pytest.fixture
def api(serve_in_threads: Serve) -> Api:
    return serve_in_threads(fhir_resource_types=TYPES)


def post(api: Api, *records: dict[str, Any]) -> list[dict[str, Any]]:
    return list(api.post("/api/v1/ingest", json={"records": list(records)}).json()["results"])


def raw(api: Api, name: str) -> list[dict[str, Any]]:
    store = build_store(api.settings)
    manifests = store.manifests("raw", name, store.partition_keys("raw", name))
    return [orjson.loads(line) for each in manifests for batch in store.batches(each.parts) for line in batch]


@pytest.mark.parametrize(
    ("record", "members"),
    [
        (
            {"resourceType": "Condition", "code": "Asthma", "date": "2024-01"},
            {
                "clinicalStatus": {
                    "coding": [{"system": "http://terminology.hl7.org/CodeSystem/condition-clinical", "code": "active"}]
                },
                "code": {"text": "Asthma"},
                "subject": "the patient",
                "onsetDateTime": "2024-01",
            },
        ),
        (
            {
                "resourceType": "AllergyIntolerance",
                "code": PENICILLIN,
                "date": "2024-01-30T08:15:00+01:00",
                "status": "resolved",
            },
            {
                "clinicalStatus": {
                    "coding": [
                        {
                            "system": "http://terminology.hl7.org/CodeSystem/allergyintolerance-clinical",
                            "code": "resolved",
                        }
                    ]
                },
                "code": {"coding": [PENICILLIN]},
                "patient": "the patient",
                "recordedDate": "2024-01-30T08:15:00+01:00",
            },
        ),
        (
            {"resourceType": "MedicationRequest", "code": "Ibuprofen 400 mg", "date": "2024-01-30"},
            {
                "status": "active",
                "intent": "order",
                "medicationCodeableConcept": {"text": "Ibuprofen 400 mg"},
                "subject": "the patient",
                "authoredOn": "2024-01-30",
            },
        ),
        (
            {"resourceType": "Procedure", "code": "Appendectomy", "date": "2024-01-30", "status": "in-progress"},
            {
                "status": "in-progress",
                "code": {"text": "Appendectomy"},
                "subject": "the patient",
                "performedDateTime": "2024-01-30",
            },
        ),
        (
            {"resourceType": "Immunization", "code": {"system": "http://hl7.org/fhir/sid/cvx", "code": "208"}},
            {
                "status": "completed",
                "vaccineCode": {"coding": [{"system": "http://hl7.org/fhir/sid/cvx", "code": "208"}]},
                "patient": "the patient",
                "occurrenceDateTime": "2024-01-30",
            },
        ),
    ],
)
def test_a_clinical_record_becomes_a_resource_of_the_patient_with_the_number(
    api: Api, record: dict[str, Any], members: dict[str, Any]
) -> None:
    patient, result = post(
        api, {"resourceType": "Patient", "mrn": "SECRET-MRN-1"}, {"mrn": "SECRET-MRN-1", "date": "2024-01-30", **record}
    )
    assert (result["status"], result["issues"]) == ("accepted", [])
    (stored,) = raw(api, record["resourceType"])
    subject = {"reference": f"Patient/{patient['id']}"}
    expected = {name: subject if value == "the patient" else value for name, value in members.items()}
    assert stored == {"resourceType": record["resourceType"], "id": result["id"], **expected}
    assert "SECRET" not in result["id"]


def test_a_record_with_another_status_is_a_version_of_the_same_resource(api: Api) -> None:
    ids = [post(api, record)[0]["id"] for record in (ASTHMA, ASTHMA, {**ASTHMA, "status": "resolved"})]
    assert len(set(ids)) == 1
    others = [post(api, {**ASTHMA, **other})[0]["id"] for other in ({"date": "2024-01-31"}, {"code": "Eczema"})]
    assert len({*ids, *others}) == 3
    assert post(api, {**ASTHMA, "id": "c-1"})[0]["id"] == "c-1"


def test_two_records_of_a_request_are_not_taken_for_versions_of_each_other(api: Api) -> None:
    first, same, second = post(api, ASTHMA, ASTHMA, {**ASTHMA, "status": "resolved"})
    assert [each["status"] for each in (first, same, second)] == ["accepted", "accepted", "rejected"]
    (issue,) = second["issues"]
    assert (issue["path"], "give each of them an id" in issue["message"]) == ("Condition.id", True)


def test_the_result_lists_the_errors_of_a_record_without_values(api: Api) -> None:
    (result,) = post(api, {"resourceType": "Procedure", "mrn": "M1", "code": 7, "nickname": "SECRET"})
    assert {issue["path"] for issue in result["issues"]} == {"Procedure", "Procedure.code"}
    assert "date is required" in {issue["message"] for issue in result["issues"]}
    wrong_values = [
        ({"mrn": "1.23457E+11"}, "Condition.mrn"),
        ({"date": "yesterday, SECRET"}, "Condition.onset"),
        ({"status": "secret-value"}, "Condition.clinicalStatus"),
        ({"status": "SECRET"}, "Condition.status"),
        ({"id": "not an id"}, "Condition.id"),
    ]
    results = post(api, *({**ASTHMA, **values} for values, _ in wrong_values))
    for each, (_, path) in zip(results, wrong_values, strict=True):
        assert (each["status"], each["issues"][0]["path"].startswith(path)) == ("rejected", True), each
    assert "secret" not in str([result, results]).lower()
    assert raw(api, "Condition") == []
