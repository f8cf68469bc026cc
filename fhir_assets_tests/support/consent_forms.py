"""The forms of docs/privacy.md in which a Consent names its patient."""

import json
from typing import Any

from fhir_assets_tests.support.consent_resources import DAY, resource

MARKER = "Withheldson"
MRN = "urn:mrn"
URN = "urn:uuid:0f2a1c34-0000-4000-8000-00000000000b"
ELSEWHERE = "https://else.example/r4/Patient/7"


def build(kind: str, key: str, **fields: Any) -> dict[str, Any]:
    """Return a resource of January 2024 with these elements."""
    return dict(json.loads(resource(kind, key, DAY, **fields)))


def build_patient(key: str, family: str = MARKER) -> dict[str, Any]:
    """Return a Patient with the record number ``mrn-<key>``."""
    return build("Patient", key, name=[{"family": family}], identifier=[{"system": MRN, "value": f"mrn-{key}"}])


def build_consent(key: str, patient: dict[str, Any], provision_type: str, **more: Any) -> dict[str, Any]:
    """Return an active Consent of scope patient-privacy with a provision of a type."""
    scope = {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/consentscope", "code": "patient-privacy"}]}
    consent = build(
        "Consent",
        key,
        status="active",
        scope=scope,
        category=[{"coding": [{"code": "59284-0"}]}],
        policyRule={"coding": [{"code": "OPTIN"}]},
        patient=patient,
        provision={"type": provision_type},
    )
    return {**consent, **more}


def build_contained(value: str) -> list[dict[str, Any]]:
    """Return a contained Patient with a record number, as a list."""
    return [{"resourceType": "Patient", "id": "inner", "identifier": [{"system": MRN, "value": value}]}]


DENIALS: dict[str, dict[str, Any]] = {
    "literal": {"patient": {"reference": "Patient/literal"}},
    "versioned": {"patient": {"reference": "Patient/versioned/_history/1"}},
    "identifier": {"patient": {"identifier": {"system": MRN, "value": "mrn-identifier"}}},
    "typed": {"patient": {"type": "Patient", "identifier": {"system": MRN, "value": "mrn-typed"}}},
    "number": {"patient": {"identifier": {"value": "mrn-number"}}},
    "conditional": {"patient": {"reference": f"Patient?identifier={MRN}|mrn-conditional"}},
    "contained": {"patient": {"reference": "#inner"}, "contained": build_contained("mrn-contained")},
    "elsewhere": {"patient": {"reference": ELSEWHERE, "identifier": {"system": MRN, "value": "mrn-elsewhere"}}},
    "urn": {"patient": {"reference": URN, "identifier": {"system": MRN, "value": "mrn-urn"}}},
    "scope": {"patient": {"reference": "Patient/scope"}, "scope": {"coding": [{"system": "urn:l", "code": "share"}]}},
}
"""The denials by the id of the Patient whom each concerns."""


def build_settings(types: str, policy: str) -> dict[str, str]:
    """Return the settings of a deployment that loads types from 2024 under a consent policy."""
    return {
        "fhir_resource_types": types,
        "fhir_last_updated_gte": "2024-01-01",
        "fhir_partition": "monthly",
        "consent_policy": policy,
    }
