"""Invariants of the 30 resource types: for each, a resource that violates it and a resource that satisfies it."""

from typing import Any

import pytest

from fhir_assets.fhir.validation import Validator
from fhir_assets.fhir.validation.invariants import OF_CONTAINED, compile_invariant
from fhir_assets.fhir.validation.rules import load_rules
from fhir_assets_tests.support.resource_samples import to_bytes

VALIDATOR = Validator()
Json = dict[str, Any]

TEXT = {"text": "x"}
UCUM = "http://unitsofmeasure.org"
TERMS = "http://terminology.hl7.org/CodeSystem/"
PATIENT = {"reference": "Patient/1"}


def coded(system: str, code: str) -> Json:
    return {"coding": [{"system": TERMS + system, "code": code}]}


ACTIVE, RESOLVED = coded("condition-clinical", "active"), coded("condition-clinical", "resolved")
CONDITION = {"resourceType": "Condition", "subject": PATIENT, "clinicalStatus": ACTIVE}
OBSERVATION = {"resourceType": "Observation", "status": "final", "code": {"coding": [{"system": "u:x", "code": "a"}]}}
ALLERGY = {"resourceType": "AllergyIntolerance", "patient": PATIENT}
ACTIVE_ALLERGY = coded("allergyintolerance-clinical", "active")
ERROR_ALLERGY = coded("allergyintolerance-verification", "entered-in-error")
CONSENT = {"resourceType": "Consent", "status": "active", "category": [TEXT], "policyRule": TEXT}
DISPENSE = {"resourceType": "MedicationDispense", "status": "completed", "medicationCodeableConcept": TEXT}
REQUEST = {
    "resourceType": "MedicationRequest",
    "status": "active",
    "intent": "order",
    "subject": PATIENT,
    "medicationCodeableConcept": TEXT,
}


def scope(code: str) -> Json:
    return {"coding": [{"system": "something", "code": code}]}


def repeat(**elements: Any) -> Json:
    return {**REQUEST, "dosageInstruction": [{"timing": {"repeat": elements}}]}


def patient_with_name_period(**period: str) -> Json:
    return {"resourceType": "Patient", "name": [{"period": period}]}


WHEN = "MedicationRequest.dosageInstruction[0].timing.repeat"

CASES: list[tuple[str, str, Json, Json]] = [
    ("ait-1", "AllergyIntolerance", ALLERGY, {**ALLERGY, "clinicalStatus": ACTIVE_ALLERGY}),
    (
        "ait-2",
        "AllergyIntolerance",
        {**ALLERGY, "clinicalStatus": ACTIVE_ALLERGY, "verificationStatus": ERROR_ALLERGY},
        {**ALLERGY, "verificationStatus": ERROR_ALLERGY},
    ),
    (
        "con-2",
        "Condition.evidence[0]",
        {**CONDITION, "evidence": [{"extension": [{"url": "u:x", "valueString": "x"}]}]},
        {**CONDITION, "evidence": [{"code": [TEXT]}]},
    ),
    (
        "con-4",
        "Condition",
        {**CONDITION, "abatementDateTime": "2024"},
        {**CONDITION, "abatementDateTime": "2024", "clinicalStatus": RESOLVED},
    ),
    (
        "con-5",
        "Condition",
        {**CONDITION, "verificationStatus": coded("condition-ver-status", "entered-in-error")},
        {**CONDITION, "verificationStatus": coded("condition-ver-status", "confirmed")},
    ),
    (
        "obs-6",
        "Observation",
        {**OBSERVATION, "valueBoolean": False, "dataAbsentReason": TEXT},
        {**OBSERVATION, "valueBoolean": False},
    ),
    (
        "obs-7",
        "Observation",
        {**OBSERVATION, "valueInteger": 1, "component": [{"code": OBSERVATION["code"]}]},
        {**OBSERVATION, "valueInteger": 1, "component": [{"code": {"coding": [{"system": "u:x", "code": "b"}]}}]},
    ),
    *(
        (f"ppc-{n}", "Consent", CONSENT | {"scope": scope(code)}, CONSENT | {"scope": scope(code), "patient": PATIENT})
        for n, code in enumerate(["patient-privacy", "research", "adr", "treatment"], 2)
    ),
    (
        "mdd-1",
        "MedicationDispense",
        {**DISPENSE, "whenPrepared": "2024-01-02", "whenHandedOver": "2024-01-01"},
        {**DISPENSE, "whenPrepared": "2024-01-01", "whenHandedOver": "2024-01-01"},
    ),
    (
        "per-1",
        "Patient.name[0].period",
        patient_with_name_period(start="2024-01-01T10:00:00Z", end="2024-01-01T10:30:00+01:00"),
        patient_with_name_period(start="2024-01-01T10:00:00+01:00", end="2024-01-01T09:30:00Z"),
    ),
    (
        "rng-2",
        "Observation.value",
        {**OBSERVATION, "valueRange": {"low": {"value": 2}, "high": {"value": 1.5}}},
        {**OBSERVATION, "valueRange": {"low": {"value": 1.5}, "high": {"value": 2}}},
    ),
    (
        "qty-3",
        "Observation.value",
        {**OBSERVATION, "valueQuantity": {"value": 1, "code": "g"}},
        {**OBSERVATION, "valueQuantity": {"value": 1, "code": "g", "system": UCUM}},
    ),
    (
        "cpt-2",
        "Patient.telecom[0]",
        {"resourceType": "Patient", "telecom": [{"value": "x"}]},
        {"resourceType": "Patient", "telecom": [{"value": "x", "system": "phone"}]},
    ),
    ("tim-2", WHEN, repeat(period=1), repeat(period=1, periodUnit="d")),
    (
        "tim-5",
        WHEN,
        repeat(period=-1, periodUnit="d"),
        repeat(period=0, periodUnit="d"),
    ),
    (
        "tim-9",
        WHEN,
        repeat(offset=5, when=["CM"]),
        repeat(offset=5, when=["ACM"]),
    ),
    (
        "org-2",
        "Organization.address[1]",
        {"resourceType": "Organization", "name": "x", "address": [{"text": "a"}, {"use": "home", "text": "b"}]},
        {"resourceType": "Organization", "name": "x", "address": [{"use": "work", "text": "b"}]},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("key", "path", "violating", "valid"), CASES, ids=[case[0] for case in CASES])
def test_a_violated_invariant_is_reported_at_its_path(key: str, path: str, violating: Json, valid: Json) -> None:
    issues = VALIDATOR.check(to_bytes(violating)).issues
    assert [(issue.rule, issue.path) for issue in issues if issue.severity == "error"] == [(f"invariant:{key}", path)]
    assert VALIDATOR.check(to_bytes(valid)).valid


CONTAINED = {"resourceType": "Practitioner", "id": "p"}


@pytest.mark.parametrize(
    "resource",
    [
        {"resourceType": "Patient", "contained": [CONTAINED], "generalPractitioner": [{"reference": "#p"}]},
        {
            "resourceType": "Patient",
            "contained": [{"resourceType": "Provenance", "id": "x", "target": [{"reference": "#"}],
                           "recorded": "2024-01-01T00:00:00Z", "agent": [{"who": {"reference": "#p"}}]}, CONTAINED],
        },
    ],
)  # fmt: skip
def test_contained_resources_may_be_referred_to_or_refer_to_their_container(resource: Json) -> None:
    assert VALIDATOR.check(to_bytes(resource)).issues == ()


def test_the_type_of_a_contained_target_is_checked() -> None:
    resource = {"resourceType": "Patient", "contained": [CONTAINED], "managingOrganization": {"reference": "#p"}}
    assert [(i.rule, i.path) for i in VALIDATOR.check(to_bytes(resource)).issues] == [
        ("reference-target", "Patient.managingOrganization")
    ]


@pytest.mark.parametrize(
    "reference",
    [
        "Practitioner/1",
        "Practitioner/1/_history/2",
        "https://example.org/fhir/Practitioner/1",
        "https://example.org/other/thing?x=1",
        "urn:uuid:53fefa32-fcbb-4ff8-8a92-55ee120877b7",
        "urn:oid:1.2.3",
        "Practitioner?identifier=u:x|1",
    ],
)
def test_references_of_every_form_are_valid(reference: str) -> None:
    resource = {"resourceType": "Patient", "generalPractitioner": [{"reference": reference}]}
    assert VALIDATOR.check(to_bytes(resource)).issues == ()


def test_invariants_skipped_without_contained_resources_hold_without_them() -> None:
    rules = [rule for rule in load_rules().structure("Patient").invariants if rule.key in OF_CONTAINED]
    assert {rule.key for rule in rules} == OF_CONTAINED
    for rule in rules:
        path = compile_invariant(rule.expression, "Patient", "Patient")
        assert path is not None
        assert path.test({"resourceType": "Patient", "active": True}) is True
