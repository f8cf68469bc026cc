"""Short observations that are posted, and the FHIR Observations that they become."""

from typing import Any

import orjson

from fhir_assets.deployment.store import build_store
from fhir_assets_tests.support.api import Api

PULSE = {
    "resourceType": "Observation",
    "mrn": "SECRET-MRN-1",
    "code": "8867-4",
    "value": 72,
    "unit": "/min",
    "effectiveDateTime": "2024-01-30T08:15:00+01:00",
}


def post(api: Api, *records: dict[str, Any]) -> list[dict[str, Any]]:
    return list(api.post("/api/v1/ingest", json={"records": list(records)}).json()["results"])


def raw(api: Api) -> list[bytes]:
    store = build_store(api.settings)
    manifests = store.manifests("raw", "Observation", store.partition_keys("raw", "Observation"))
    return [line for manifest in manifests for batch in store.batches(manifest.parts) for line in batch]


def test_a_short_observation_becomes_an_observation_of_the_patient_with_the_number(api: Api) -> None:
    patient, pulse = post(api, {"resourceType": "Patient", "mrn": "SECRET-MRN-1"}, {**PULSE, "category": "vital-signs"})
    assert (pulse["status"], pulse["issues"]) == ("accepted", [])
    (stored,) = map(orjson.loads, raw(api))
    assert stored == {
        "resourceType": "Observation",
        "id": pulse["id"],
        "status": "final",
        "category": [
            {
                "coding": [
                    {"system": "http://terminology.hl7.org/CodeSystem/observation-category", "code": "vital-signs"}
                ]
            }
        ],
        "code": {"coding": [{"system": "http://loinc.org", "code": "8867-4"}]},
        "subject": {"reference": f"Patient/{patient['id']}"},
        "effectiveDateTime": PULSE["effectiveDateTime"],
        "valueQuantity": {"value": 72, "unit": "/min"},
    }


def test_values_keep_their_kind_and_their_digits(api: Api) -> None:
    body = (
        b'{"records": [{"resourceType":"Observation","mrn":"M1","code":"15074-8","value":6.30,"unit":"mmol/L",'
        b'"effectiveDateTime":"2024-01-30"}]}'
    )
    assert api.post("/api/v1/ingest", data=body).status_code == 202
    (line,) = raw(api)
    assert b'"valueQuantity":{"value":6.30,"unit":"mmol/L"}' in line
    without_unit = {name: value for name, value in PULSE.items() if name != "unit"}
    local = {"system": "urn:lab", "code": "GRP", "display": "Blood group"}
    results = post(
        api, {**without_unit, "code": "Smoker", "value": True}, {**without_unit, "code": local, "value": "A"}
    )
    assert [result["status"] for result in results] == ["accepted"] * 2
    smoker, group = (orjson.loads(line) for line in raw(api)[1:])
    assert (smoker["code"], smoker["valueBoolean"]) == ({"text": "Smoker"}, True)
    assert (group["code"], group["valueString"]) == ({"coding": [local]}, "A")


def test_an_observation_that_is_posted_again_is_the_same_and_another_value_is_another_one(api: Api) -> None:
    [posted] = {post(api, record)[0]["id"] for record in (PULSE, PULSE, {**PULSE, "status": "entered-in-error"})}
    others: list[dict[str, Any]] = [
        {"value": 90},
        {"value": "72", "unit": None},
        {"unit": "Hz"},
        {"effectiveDateTime": "2024-01-30"},
    ]
    records = [{name: value for name, value in {**PULSE, **other}.items() if value} for other in others]
    ids = {post(api, record)[0]["id"] for record in records}
    assert len(ids | {posted}) == 5
    assert "SECRET" not in str(ids)


def test_a_correction_has_the_id_of_the_answer(api: Api) -> None:
    (posted,) = post(api, PULSE)
    (corrected,) = post(api, {**PULSE, "id": posted["id"], "value": 71, "status": "corrected"})
    assert corrected["id"] == posted["id"]
    first, second = map(orjson.loads, raw(api))
    assert (first["id"], second["id"]) == (posted["id"], posted["id"])
    assert (first["valueQuantity"]["value"], second["valueQuantity"]["value"]) == (72, 71)


def test_two_records_of_a_request_are_not_taken_for_versions_of_each_other(api: Api) -> None:
    preliminary = {**PULSE, "status": "preliminary"}
    first, same, other, second = post(api, PULSE, PULSE, {**PULSE, "value": 90}, preliminary)
    assert [each["status"] for each in (first, same, other, second)] == ["accepted", "accepted", "accepted", "rejected"]
    (issue,) = second["issues"]
    assert (issue["path"], "give each of them an id" in issue["message"]) == ("Observation.id", True)


def test_the_result_lists_all_errors_of_an_observation_without_values(api: Api) -> None:
    wrong = {**PULSE, "code": 7, "value": None, "status": "SECRET", "nickname": "SECRET", "category": "pulse"}
    (result,) = post(api, {name: value for name, value in wrong.items() if name != "effectiveDateTime"})
    assert {issue["path"] for issue in result["issues"]} == {
        *("Observation", "Observation.category", "Observation.code", "Observation.status", "Observation.value"),
    }
    assert {issue["message"] for issue in result["issues"]} >= {
        "effectiveDateTime is required",
        "must be a text, or an object with system, code and display",
        "must be of type number or string or boolean",
    }
    assert "SECRET" not in str(result)
    wrong_values = [
        ({"mrn": "1.23457E+11"}, "Observation.mrn"),
        ({"value": "high"}, "Observation.unit"),
        ({"effectiveDateTime": "yesterday"}, "Observation.effective"),
        ({"id": "not an id"}, "Observation.id"),
    ]
    results = post(api, *({**PULSE, **values} for values, _ in wrong_values))
    found = [(each["status"], each["issues"][0]["path"]) for each in results]
    assert found == [("rejected", path) for _, path in wrong_values]
    assert raw(api) == []
