"""Elements that repeat, or whose resource is contained, reach the tables whole: no row shows the first of them only."""

from typing import Any

import pytest

from fhir_assets.catalog import snake_case
from fhir_assets_tests.support.shipped_views import Row, build_rows


def rows_of(view: str, resource_type: str, **elements: Any) -> list[Row]:
    return build_rows({"resourceType": resource_type, "id": "a", **elements})[view]


def refer(*references: str) -> list[dict[str, str]]:
    return [{"reference": reference} for reference in references]


@pytest.mark.parametrize(
    "resource_type",
    [
        "Encounter",
        "Procedure",
        "MedicationRequest",
        "MedicationStatement",
        "MedicationAdministration",
        "ServiceRequest",
        "Immunization",
    ],
)
def test_each_reason_by_reference_is_a_row(resource_type: str) -> None:
    reasons = refer("Condition/c1", "Observation/o1", "Condition/c2")
    rows = rows_of(f"{snake_case(resource_type)}_reason_reference", resource_type, reasonReference=reasons)
    assert [(row["index"], row["condition_key"], row["observation_key"]) for row in rows] == [
        (0, "c1", None),
        (1, None, "o1"),
        (2, "c2", None),
    ]


MEDICATIONS = ["MedicationRequest", "MedicationStatement", "MedicationDispense", "MedicationAdministration"]
RXNORM = "http://www.nlm.nih.gov/research/umls/rxnorm"


@pytest.mark.parametrize("resource_type", MEDICATIONS)
def test_a_contained_medication_fills_the_columns_of_its_parent(resource_type: str) -> None:
    codings = [{"system": "urn:local", "code": "L"}, {"system": RXNORM, "code": "860975", "display": "Metformin"}]
    elements = {
        "contained": [
            {"resourceType": "Organization", "id": "med", "name": "Not this one"},
            {"resourceType": "Medication", "id": "drug", "code": {"coding": codings, "text": "metformin 500"}},
        ],
        "medicationReference": {"reference": "#drug"},
    }
    [row] = rows_of(snake_case(resource_type), resource_type, **elements)
    assert (row["medication_system"], row["medication_code"]) == ("urn:local", "L")
    assert (row["medication_text"], row["rxnorm_code"], row["medication_key"]) == ("metformin 500", "860975", None)
    rows = rows_of(f"{snake_case(resource_type)}_medication_coding", resource_type, **elements)
    assert [(row["index"], row["system"], row["code"], row["display"]) for row in rows] == [
        (0, "urn:local", "L", None),
        (1, RXNORM, "860975", "Metformin"),
    ]


@pytest.mark.parametrize("resource_type", MEDICATIONS)
def test_a_medication_that_is_a_resource_of_its_own_gives_its_key_only(resource_type: str) -> None:
    elements = {
        "contained": [{"resourceType": "Medication", "id": "m1", "code": {"text": "another"}}],
        "medicationReference": {"reference": "Medication/m1"},
    }
    [row] = rows_of(snake_case(resource_type), resource_type, **elements)
    assert (row["medication_key"], row["medication_text"]) == ("m1", None)


@pytest.mark.parametrize("resource_type", ["Claim", "ExplanationOfBenefit"])
def test_a_contained_coverage_fills_the_columns_of_its_claim(resource_type: str) -> None:
    coverage = {
        "resourceType": "Coverage",
        "id": "coverage",
        "type": {"text": "Humana", "coding": [{"code": "HMO"}]},
        "payor": [{"display": "Humana Inc."}],
    }
    elements = {
        "contained": [coverage],
        "insurance": [
            {"focal": False, "coverage": {"reference": "Coverage/c0"}},
            {"focal": True, "coverage": {"reference": "#coverage"}},
        ],
    }
    expected = ("HMO", "Humana", "Humana Inc.")
    names = ("coverage_type_code", "coverage_type_text", "coverage_payor_display")
    [row] = rows_of(snake_case(resource_type), resource_type, **elements)
    assert tuple(row[name] for name in names) == expected
    rows = rows_of(f"{snake_case(resource_type)}_insurance", resource_type, **elements)
    assert [row["coverage_key"] for row in rows] == ["c0", None]
    assert tuple(rows[1][name] for name in names) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ({"text": "Dr. Ann Lee"}, "Dr. Ann Lee"),
        ({"family": "Lee", "given": ["Ann", "B."]}, "Ann B. Lee"),
    ],
)
def test_a_contained_requester_is_named(name: dict[str, Any], expected: str) -> None:
    for resource_type in ("MedicationRequest", "ServiceRequest"):
        [row] = rows_of(
            snake_case(resource_type),
            resource_type,
            contained=[{"resourceType": "Practitioner", "id": "p", "name": [name]}],
            requester={"reference": "#p"},
        )
        assert row["requester_display"] == expected


@pytest.mark.parametrize(
    ("resource_type", "element", "view"),
    [
        ("Condition", "code", "condition_code_coding"),
        ("Observation", "code", "observation_code_coding"),
        ("Observation", "valueCodeableConcept", "observation_value_coding"),
        ("Procedure", "code", "procedure_code_coding"),
        ("DiagnosticReport", "code", "diagnostic_report_code_coding"),
        ("AllergyIntolerance", "code", "allergy_intolerance_code_coding"),
        ("Medication", "code", "medication_code_coding"),
        ("MedicationRequest", "medicationCodeableConcept", "medication_request_medication_coding"),
        ("ServiceRequest", "code", "service_request_code_coding"),
        ("Immunization", "vaccineCode", "immunization_vaccine_code_coding"),
        ("DocumentReference", "type", "document_reference_type_coding"),
        ("Device", "type", "device_type_coding"),
        ("Specimen", "type", "specimen_type_coding"),
    ],
)
def test_every_coding_is_a_row(resource_type: str, element: str, view: str) -> None:
    codings = [
        {"system": "http://loinc.org", "version": "2.78", "code": "4548-4", "display": "HbA1c"},
        {"system": "http://loinc.org", "code": "17856-6", "userSelected": True},
    ]
    rows = rows_of(view, resource_type, **{element: {"coding": codings}})
    assert [(row["index"], row["version"], row["code"], row["display"], row["user_selected"]) for row in rows] == [
        (0, "2.78", "4548-4", "HbA1c", None),
        (1, None, "17856-6", None, True),
    ]


def test_codings_of_several_encounter_types_keep_their_positions() -> None:
    types = [{"coding": [{"code": "a"}, {"code": "b"}]}, {"text": "no coding"}, {"coding": [{"code": "c"}]}]
    rows = rows_of("encounter_type_coding", "Encounter", type=types)
    assert [(row["type_index"], row["index"], row["code"]) for row in rows] == [(0, 0, "a"), (0, 1, "b"), (2, 0, "c")]


def test_a_claim_keeps_its_supporting_information_modifiers_and_links() -> None:
    for resource_type in ("Claim", "ExplanationOfBenefit"):
        key = snake_case(resource_type)
        info = {
            "sequence": 1,
            "category": {"coding": [{"code": "drg"}]},
            "code": {"coding": [{"system": "https://www.cms.gov/MS-DRG", "code": "470"}]},
            "valueQuantity": {"value": 30, "unit": "days"},
        }
        item = {
            "sequence": 7,
            "modifier": [{"coding": [{"code": "25"}]}, {"coding": [{"code": "59"}]}],
            "diagnosisSequence": [1, 3],
            "procedureSequence": [2],
            "detail": [{"sequence": 1, "productOrService": {"coding": [{"code": "x"}]}}],
        }
        built = build_rows({"resourceType": resource_type, "id": "a", "supportingInfo": [info], "item": [item]})
        [row] = built[f"{key}_supporting_info"]
        assert (row["category_code"], row["code"], row["value_quantity_value"]) == ("drg", "470", 30)
        assert [(r["item_sequence"], r["modifier_code"]) for r in built[f"{key}_item_modifier"]] == [
            (7, "25"),
            (7, "59"),
        ]
        assert [r["diagnosis_sequence"] for r in built[f"{key}_item_diagnosis"]] == [1, 3]
        assert [r["procedure_sequence"] for r in built[f"{key}_item_procedure"]] == [2]
        assert [(r["item_sequence"], r["product_code"]) for r in built[f"{key}_item_detail"]] == [(7, "x")]


def test_every_race_of_a_patient_is_a_row() -> None:
    url = "http://hl7.org/fhir/us/core/StructureDefinition/us-core-race"
    parts = [
        {"url": "ombCategory", "valueCoding": {"code": "2106-3"}},
        {"url": "ombCategory", "valueCoding": {"code": "2028-9"}},
        {"url": "detailed", "valueCoding": {"code": "2039-6", "display": "Japanese"}},
        {"url": "text", "valueString": "Mixed"},
    ]
    rows = rows_of("patient_race", "Patient", extension=[{"url": url, "extension": parts}])
    assert [(row["category"], row["code"]) for row in rows] == [
        ("ombCategory", "2106-3"),
        ("ombCategory", "2028-9"),
        ("detailed", "2039-6"),
    ]


def test_a_row_of_a_child_view_has_the_status_and_the_time_of_its_resource() -> None:
    meta = {"lastUpdated": "2024-01-03T04:25:20Z"}
    [row] = rows_of(
        "observation_interpretation",
        "Observation",
        meta=meta,
        status="entered-in-error",
        interpretation=[{"coding": [{"code": "H"}]}],
    )
    assert (row["status"], row["last_updated"]) == ("entered-in-error", meta["lastUpdated"])
    [row] = rows_of(
        "encounter_location",
        "Encounter",
        meta=meta,
        status="finished",
        location=[{"location": {"reference": "Location/l"}, "status": "completed"}],
    )
    assert (row["encounter_status"], row["status"]) == ("finished", "completed")


ACT = "http://terminology.hl7.org/CodeSystem/v3-ActCode"


@pytest.mark.parametrize(
    ("coding", "display"),
    [
        ({"system": ACT, "code": "AMB"}, "ambulatory"),
        ({"system": ACT, "code": "VR"}, "virtual"),
        ({"system": ACT, "code": "IMP", "display": "Ward"}, "Ward"),
        ({"system": ACT, "code": "of tomorrow"}, None),
        ({"system": "http://local.example", "code": "AMB"}, None),
        ({"code": "AMB"}, None),
    ],
)
def test_the_name_of_a_class_comes_from_the_value_set_if_the_source_sends_none(
    coding: dict[str, str], display: str | None
) -> None:
    [row] = rows_of("encounter", "Encounter", **{"class": coding})
    assert (row["class_code"], row["class_display"]) == (coding["code"], display)


def test_names_of_marital_status_and_discharge_come_from_the_value_set_as_well() -> None:
    codes = "http://terminology.hl7.org/CodeSystem"
    status = {"coding": [{"system": f"{codes}/v3-MaritalStatus", "code": "S"}]}
    [row] = rows_of("patient", "Patient", maritalStatus=status)
    assert row["marital_status_display"] == "Never Married"
    discharge = {"coding": [{"system": f"{codes}/discharge-disposition", "code": "exp"}]}
    [row] = rows_of("encounter", "Encounter", hospitalization={"dischargeDisposition": discharge})
    assert row["discharge_disposition_display"] == "Expired"
