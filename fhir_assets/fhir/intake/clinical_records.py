"""FHIR resources built from short clinical records: a code and a date of a person with a medical record number."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from fhir_assets.fhir.intake.resources import DeriveId

_CONDITION_STATUS = "http://terminology.hl7.org/CodeSystem/condition-clinical"
_ALLERGY_STATUS = "http://terminology.hl7.org/CodeSystem/allergyintolerance-clinical"


class _Form(NamedTuple):
    """The members of a resource type that hold the parts of a record. ``status`` is the default.

    With ``status_system`` the status is a concept of that system, ``clinicalStatus``.
    """

    subject: str
    code: str
    date: str
    status: str
    status_system: str = ""
    others: Mapping[str, str] = {}


_FORMS: Mapping[str, _Form] = {
    "AllergyIntolerance": _Form("patient", "code", "recordedDate", "active", _ALLERGY_STATUS),
    "Condition": _Form("subject", "code", "onsetDateTime", "active", _CONDITION_STATUS),
    "Immunization": _Form("patient", "vaccineCode", "occurrenceDateTime", "completed"),
    "MedicationRequest": _Form(
        "subject", "medicationCodeableConcept", "authoredOn", "active", others={"intent": "order"}
    ),
    "Procedure": _Form("subject", "code", "performedDateTime", "completed"),
}
TYPES = frozenset(_FORMS)
"""The resource types that short clinical records become."""


def is_clinical_record(record: object) -> bool:
    """Return whether ``record`` is a short record rather than a resource: it has ``mrn``, which FHIR does not know."""
    return isinstance(record, dict) and record.get("resourceType") in TYPES and "mrn" in record


def build_clinical_resource(record: Mapping[str, Any], derive_id: DeriveId) -> dict[str, Any]:
    """Return the resource of a valid clinical record. Its id is derived from number, code and date unless it has one.

    Another status of the same record is therefore another version of the same resource.
    """
    name, code = record["resourceType"], record["code"]
    form = _FORMS[name]
    concept: dict[str, Any] = {"text": code} if isinstance(code, str) else {"coding": [dict(code)]}
    identity = orjson.dumps([record["mrn"], concept, record["date"]]).decode()
    status = record.get("status", form.status)
    return {
        "resourceType": name,
        "id": record.get("id") or derive_id(name, identity),
        **(
            {"clinicalStatus": {"coding": [{"system": form.status_system, "code": status}]}}
            if form.status_system
            else {"status": status}
        ),
        **form.others,
        form.code: concept,
        form.subject: {"reference": f"Patient/{derive_id('Patient', record['mrn'])}"},
        form.date: record["date"],
    }
