"""FHIR resources built from intake records: patient records of the HTTP API and visits in CSV.

Ids are derived from record numbers, so that a person has the same Patient id in every ingestion channel. The caller
passes the derivation: with encryption keys, an id does not reveal the record number.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import orjson

DeriveId = Callable[[str, str], str]
"""A function from a resource type and a record number to an id."""

PURPOSES: Mapping[str, str] = {"data_sharing": "data-sharing", "research": "research"}
PURPOSE_SYSTEM = "https://fhir-assets.dev/CodeSystem/consent-purpose"
INTAKE_POLICY = "https://fhir-assets.dev/policy/intake"
MRN_SYSTEM = "https://fhir-assets.dev/NamingSystem/mrn"
ACCOUNT_SYSTEM = "https://fhir-assets.dev/NamingSystem/visit-account-number"
_CATEGORY = "http://terminology.hl7.org/CodeSystem/observation-category"
_LOINC = "http://loinc.org"
_is_loinc = re.compile(r"[0-9]{1,7}-[0-9]").fullmatch
_V2_0203 = "http://terminology.hl7.org/CodeSystem/v2-0203"


def is_patient_record(record: object) -> bool:
    """Return whether ``record`` is an intake record of a patient rather than a FHIR Patient.

    An intake record has the member ``mrn``, ``ssn`` or ``consent``, or a ``name`` that is a text or an object.
    """
    return (
        isinstance(record, dict)
        and record.get("resourceType") == "Patient"
        and ("mrn" in record or "ssn" in record or "consent" in record or isinstance(record.get("name"), str | dict))
    )


def build_patient_resources(record: Mapping[str, Any], derive_id: DeriveId, *, now: str) -> list[dict[str, Any]]:
    """Return the Patient of a valid patient record, followed by its Consent if the record contains one.

    ``now`` is the ``meta.lastUpdated`` of both.
    """
    mrn = record["mrn"]
    identifiers = [_identifier("MR", MRN_SYSTEM, mrn)]
    if "ssn" in record:
        digits = record["ssn"].replace("-", "")
        ssn = f"{digits[:3]}-{digits[3:5]}-{digits[5:]}"
        identifiers.append(_identifier("SS", "http://hl7.org/fhir/sid/us-ssn", ssn))
    patient: dict[str, Any] = {
        "resourceType": "Patient",
        "id": derive_id("Patient", mrn),
        "meta": {"lastUpdated": now},
        "identifier": identifiers,
    }
    if "name" in record:
        patient["name"] = [_name(record["name"])]
    for name in ("gender", "birthDate"):
        if name in record:
            patient[name] = record[name]
    resources = [patient]
    if "consent" in record:
        resources.append(_consent(record["consent"], patient["id"], derive_id("Consent", mrn), now))
    return resources


def is_observation_record(record: object) -> bool:
    """Return whether ``record`` is an intake record of an observation rather than a FHIR Observation.

    An intake record has the member ``mrn``, which FHIR does not know.
    """
    return isinstance(record, dict) and record.get("resourceType") == "Observation" and "mrn" in record


def build_observation(record: Mapping[str, Any], derive_id: DeriveId) -> dict[str, Any]:
    """Return the Observation of a valid observation record. Numbers keep their digits if they are Decimals.

    The value is part of the derived id: two readings of one day are two Observations, not versions of one.
    """
    code = _build_concept(record["code"])
    value = record["value"]
    kind = type(value).__name__ if isinstance(value, bool | str) else "number"
    identity = [record["mrn"], code, record["effectiveDateTime"], kind, str(value), record.get("unit")]
    observation: dict[str, Any] = {
        "resourceType": "Observation",
        "id": record.get("id") or derive_id("Observation", orjson.dumps(identity).decode()),
        "status": record.get("status", "final"),
    }
    if "category" in record:
        observation["category"] = [{"coding": [{"system": _CATEGORY, "code": record["category"]}]}]
    observation["code"] = code
    observation["subject"] = {"reference": f"Patient/{derive_id('Patient', record['mrn'])}"}
    observation["effectiveDateTime"] = record["effectiveDateTime"]
    if isinstance(value, bool):
        observation["valueBoolean"] = value
    elif isinstance(value, str):
        observation["valueString"] = value
    else:
        unit = {"unit": record["unit"]} if "unit" in record else {}
        observation["valueQuantity"] = {"value": orjson.Fragment(str(value)), **unit}
    return observation


def _build_concept(code: str | Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(code, str):
        return {"coding": [dict(code)]}
    return {"coding": [{"system": _LOINC, "code": code}]} if _is_loinc(code) else {"text": code}


def build_visit_patient(row: Mapping[str, str], resource_id: str, *, version: int, updated: str) -> dict[str, Any]:
    """Return the Patient of a valid visit, with the given version and instant of its last update."""
    return {
        "resourceType": "Patient",
        "id": resource_id,
        "meta": {"versionId": str(version), "lastUpdated": updated},
        "identifier": [_identifier("MR", MRN_SYSTEM, row["mrn"])],
        "name": [{"use": "official", "family": row["last_name"], "given": [row["first_name"]]}],
        "birthDate": row["birth_date"],
    }


def build_visit_encounter(row: Mapping[str, str], resource_id: str, patient_id: str, *, updated: str) -> dict[str, Any]:
    """Return the Encounter of a valid visit, with the given instant of its last update."""
    encounter = {
        "resourceType": "Encounter",
        "id": resource_id,
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
    """Encode a resource as JSON on one line."""
    return orjson.dumps(resource)


def _identifier(kind: str, system: str, value: str) -> dict[str, Any]:
    return {"type": {"coding": [{"system": _V2_0203, "code": kind}]}, "system": system, "value": value}


def _name(name: str | Mapping[str, str]) -> dict[str, Any]:
    if isinstance(name, str):
        *given, family = name.split()
        return {"use": "official", "text": name, "family": family, **({"given": given} if given else {})}
    human_name: dict[str, Any] = {"use": "official"}
    if "last" in name:
        human_name["family"] = name["last"].strip()
    if "first" in name:
        human_name["given"] = name["first"].split()
    return human_name


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
        "category": [{"coding": [{"system": _LOINC, "code": "59284-0", "display": "Consent Document"}]}],
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
