"""Intake records as FHIR resources. Ids are derived, so that the same person is the same Patient whichever way it
comes; how, the caller says: with keys nobody can read a number from an id.
"""

from collections.abc import Callable, Mapping
from typing import Any

import orjson

DeriveId = Callable[[str, str], str]
"""From a resource type and a number to an id."""

PURPOSES: Mapping[str, str] = {"data_sharing": "data-sharing", "research": "research"}
PURPOSE_SYSTEM = "https://fhir-assets.dev/CodeSystem/consent-purpose"
INTAKE_POLICY = "https://fhir-assets.dev/policy/intake"
MRN_SYSTEM = "https://fhir-assets.dev/NamingSystem/mrn"
ACCOUNT_SYSTEM = "https://fhir-assets.dev/NamingSystem/visit-account-number"
_V2_0203 = "http://terminology.hl7.org/CodeSystem/v2-0203"


def is_patient_record(record: object) -> bool:
    """Whether this is a patient as intake takes it, not a FHIR Patient: it has an MRN of its own, or a name as text."""
    return (
        isinstance(record, dict)
        and record.get("resourceType") == "Patient"
        and ("mrn" in record or "ssn" in record or "consent" in record or isinstance(record.get("name"), str | dict))
    )


def build_patient_resources(record: Mapping[str, Any], identify: DeriveId, *, now: str) -> list[dict[str, Any]]:
    """The Patient of a valid patient record, and where consent is given its Consent. ``now`` is an instant."""
    mrn = record["mrn"]
    identifiers = [_identifier("MR", MRN_SYSTEM, mrn)]
    if "ssn" in record:
        digits = record["ssn"].replace("-", "")
        ssn = f"{digits[:3]}-{digits[3:5]}-{digits[5:]}"
        identifiers.append(_identifier("SS", "http://hl7.org/fhir/sid/us-ssn", ssn))
    patient: dict[str, Any] = {
        "resourceType": "Patient",
        "id": identify("Patient", mrn),
        "meta": {"lastUpdated": now},
        "identifier": identifiers,
    }
    if "name" in record:
        patient["name"] = [_name(record["name"])]
    for name in ("gender", "birthDate"):
        if name in record:
            patient[name] = record[name]
    found = [patient]
    if "consent" in record:
        found.append(_consent(record["consent"], patient["id"], identify("Consent", mrn), now))
    return found


def build_visit_patient(row: Mapping[str, str], identity: str, *, version: int, updated: str) -> dict[str, Any]:
    """The Patient of a valid visit, as its ``version`` of the instant ``updated``."""
    return {
        "resourceType": "Patient",
        "id": identity,
        "meta": {"versionId": str(version), "lastUpdated": updated},
        "identifier": [_identifier("MR", MRN_SYSTEM, row["mrn"])],
        "name": [{"use": "official", "family": row["last_name"], "given": [row["first_name"]]}],
        "birthDate": row["birth_date"],
    }


def build_visit_encounter(row: Mapping[str, str], identity: str, patient_id: str, *, updated: str) -> dict[str, Any]:
    """The Encounter of a valid visit, of the instant ``updated``."""
    encounter = {
        "resourceType": "Encounter",
        "id": identity,
        "meta": {"versionId": "1", "lastUpdated": updated},
        "identifier": [_identifier("AN", ACCOUNT_SYSTEM, row["visit_account_number"])],
        "status": "finished",
        "class": {"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": "AMB", "display": "ambulatory"},
        "subject": {"reference": f"Patient/{patient_id}"},
        "period": {"start": row["visit_date"]},
    }
    if reason := row.get("reason", "").strip():
        encounter["reasonCode"] = [{"text": reason}]
    return encounter


def encode_resource(resource: Mapping[str, Any]) -> bytes:
    """A resource as JSON on one line."""
    return orjson.dumps(resource)


def _identifier(kind: str, system: str, value: str) -> dict[str, Any]:
    return {"type": {"coding": [{"system": _V2_0203, "code": kind}]}, "system": system, "value": value}


def _name(name: str | Mapping[str, str]) -> dict[str, Any]:
    if isinstance(name, str):
        *given, family = name.split()
        return {"use": "official", "text": name, "family": family, **({"given": given} if given else {})}
    found: dict[str, Any] = {"use": "official"}
    if "last" in name:
        found["family"] = name["last"].strip()
    if "first" in name:
        found["given"] = name["first"].split()
    return found


def _consent(consent: Mapping[str, bool], patient_id: str, consent_id: str, now: str) -> dict[str, Any]:
    return {
        "resourceType": "Consent",
        "id": consent_id,
        "meta": {"lastUpdated": now},
        "status": "active",
        "scope": {
            "coding": [
                {"system": "http://terminology.hl7.org/CodeSystem/consentscope", "code": "patient-privacy"},
            ]
        },
        "category": [{"coding": [{"system": "http://loinc.org", "code": "59284-0", "display": "Consent Document"}]}],
        "patient": {"reference": f"Patient/{patient_id}"},
        "dateTime": now,
        "policy": [{"uri": INTAKE_POLICY}],
        "provision": {
            "provision": [
                {
                    "type": "permit" if allowed else "deny",
                    "purpose": [{"system": PURPOSE_SYSTEM, "code": PURPOSES[name]}],
                }
                for name, allowed in sorted(consent.items())
            ]
        },
    }
