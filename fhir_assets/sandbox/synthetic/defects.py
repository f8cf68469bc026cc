"""Defects of resources, each with the validation rule that must detect it.

A defect does not change ``resourceType``, ``id`` and ``meta``, so that a server can still serve the resource.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import orjson

Resource = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Defect:
    """A defect. ``types`` are the types it applies to (empty: all); ``rule`` is the rule of the resulting issue."""

    name: str
    rule: str
    types: frozenset[str]
    apply: Callable[[Resource], None]


_REQUIRED: Mapping[str, str] = {
    "AllergyIntolerance": "patient",
    "CarePlan": "status",
    "Claim": "status",
    "Condition": "subject",
    "Consent": "status",
    "Coverage": "status",
    "DiagnosticReport": "status",
    "DocumentReference": "status",
    "Encounter": "status",
    "ExplanationOfBenefit": "outcome",
    "Goal": "lifecycleStatus",
    "ImagingStudy": "status",
    "Immunization": "status",
    "MedicationAdministration": "status",
    "MedicationDispense": "status",
    "MedicationRequest": "intent",
    "MedicationStatement": "status",
    "Observation": "status",
    "Procedure": "status",
    "Provenance": "recorded",
    "ServiceRequest": "intent",
}
_STATUS = frozenset(name for name, element in _REQUIRED.items() if element == "status")
_DATES: Mapping[str, str] = {
    "Condition": "recordedDate",
    "Coverage": "period",
    "DocumentReference": "date",
    "Encounter": "period",
    "Immunization": "occurrenceDateTime",
    "MedicationRequest": "authoredOn",
    "Observation": "effectiveDateTime",
    "Patient": "birthDate",
    "ServiceRequest": "authoredOn",
}
_SUBJECTS: Mapping[str, str] = {
    "AllergyIntolerance": "patient",
    "CarePlan": "subject",
    "Claim": "patient",
    "Condition": "subject",
    "Encounter": "subject",
    "Immunization": "patient",
    "MedicationRequest": "subject",
    "Procedure": "subject",
}
_BOOLEANS: Mapping[str, str] = {
    "Immunization": "primarySource",
    "Organization": "active",
    "Patient": "active",
    "Practitioner": "active",
    "PractitionerRole": "active",
}


def _invalid_gender(resource: Resource) -> None:
    resource["gender"] = "malee"


def _unknown_status(resource: Resource) -> None:
    resource["status"] = "almost-final"


def _missing(resource: Resource) -> None:
    del resource[_REQUIRED[resource["resourceType"]]]


def _text_for_boolean(resource: Resource) -> None:
    resource[_BOOLEANS[resource["resourceType"]]] = "true"


def _text_for_number(resource: Resource) -> None:
    resource["numberOfSeries"] = "2"


def _unknown_element(resource: Resource) -> None:
    resource["favouriteColour"] = "blue"


def _impossible_date(resource: Resource) -> None:
    element = _DATES[resource["resourceType"]]
    if element == "period":
        resource[element] = {"start": "2023-02-30"}
    else:
        resource[element] = "2023-02-30"


def _wrong_target(resource: Resource) -> None:
    resource[_SUBJECTS[resource["resourceType"]]] = {"reference": "Medication/1"}


def _empty_array(resource: Resource) -> None:
    resource["extension"] = []


def _empty_object(resource: Resource) -> None:
    resource["text"] = {}


def _single_for_list(resource: Resource) -> None:
    resource["identifier"] = resource["identifier"][0]


def _two_values(resource: Resource) -> None:
    resource["valueString"] = "5"
    resource["valueInteger"] = 5


def _reason_with_value(resource: Resource) -> None:
    resource.setdefault("valueString", "5")
    for name in [name for name in resource if name.startswith("value") and name != "valueString"]:
        del resource[name]
    resource["dataAbsentReason"] = {"text": "unknown"}


def _nameless_contact(resource: Resource) -> None:
    resource["contact"] = [{"gender": "female"}]


def _period_backwards(resource: Resource) -> None:
    resource["period"] = {"start": "2024-05-02", "end": "2024-05-01"}


def _script_in_narrative(resource: Resource) -> None:
    resource["text"] = {
        "status": "generated",
        "div": '<div xmlns="http://www.w3.org/1999/xhtml"><script>alert(1)</script></div>',
    }


def _unclosed_narrative(resource: Resource) -> None:
    resource["text"] = {"status": "generated", "div": '<div xmlns="http://www.w3.org/1999/xhtml"><p>text</div>'}


def _types(*names: str) -> frozenset[str]:
    return frozenset(names)


DEFECTS: tuple[Defect, ...] = (
    Defect("gender malee", "required-binding", _types("Patient", "Practitioner"), _invalid_gender),
    Defect("unknown status", "required-binding", _STATUS, _unknown_status),
    Defect("missing required element", "cardinality", frozenset(_REQUIRED), _missing),
    Defect("text for a boolean", "primitive", frozenset(_BOOLEANS), _text_for_boolean),
    Defect("text for a number", "primitive", _types("ImagingStudy"), _text_for_number),
    Defect("unknown element", "structure", frozenset(), _unknown_element),
    Defect("impossible date", "primitive", frozenset(_DATES), _impossible_date),
    Defect("wrong reference target", "reference-target", frozenset(_SUBJECTS), _wrong_target),
    Defect("empty array", "structure", frozenset(), _empty_array),
    Defect("empty object", "structure", frozenset(), _empty_object),
    Defect("one element for a list", "structure", _types("Claim", "Encounter", "Patient"), _single_for_list),
    Defect("two values", "cardinality", _types("Observation"), _two_values),
    Defect("absent reason with a value", "invariant:obs-6", _types("Observation"), _reason_with_value),
    Defect("contact without details", "invariant:pat-1", _types("Patient"), _nameless_contact),
    Defect("period backwards", "invariant:per-1", _types("Encounter", "CarePlan"), _period_backwards),
    Defect("script in the narrative", "invariant:txt-1", frozenset(), _script_in_narrative),
    Defect("narrative that is not XHTML", "primitive", frozenset(), _unclosed_narrative),
)
"""All defects. Several apply to each type of the catalog."""


def break_resource(resource_type: str, body: bytes, random: Random) -> tuple[Defect, bytes]:
    """Give a resource a defect that applies to its type. Returns the defect and the changed resource."""
    fitting = [defect for defect in DEFECTS if not defect.types or resource_type in defect.types]
    specific = [defect for defect in fitting if defect.types]
    defect = random.choice(specific if specific and random.random() < 0.7 else fitting)
    resource = orjson.loads(body)
    defect.apply(resource)
    return defect, orjson.dumps(resource)
