"""Records of patients, their Observations and Consents, and views of these resource types."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from fhir_assets.fhir.record import Record
from fhir_assets.fhir.subjects import find_subjects
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets_tests.support.views import column, view

START = datetime(2024, 1, 1, tzinfo=UTC)
VIEWS = (
    view("patient", "Patient", column("gender", "gender", "code")),
    view("patient_name", "Patient", column("family", "family", "string"), forEach="name"),
    view("observation", "Observation", column("status", "status", "code")),
    view("consent", "Consent", column("status", "status", "code")),
    view("organization", "Organization", column("name", "name", "string")),
)


def record(resource: dict[str, Any]) -> Record:
    """Return the record of a resource, updated one minute after START for each number of its version."""
    version = resource.get("meta", {}).get("versionId", "1")
    moment = START + int(version) * timedelta(minutes=1)
    body = json.dumps(resource).encode()
    patients, mentions = find_subjects(resource, None, NO_ENCRYPTION.fingerprint)
    return Record(resource["resourceType"], resource["id"], version, moment, moment, body, patients, mentions=mentions)


def patient(key: str, **fields: Any) -> dict[str, Any]:
    """Return a Patient with a family name."""
    return {"resourceType": "Patient", "id": key, "name": [{"family": f"F{key}"}], **fields}


def observation(key: str, *patients: str, version: int = 1) -> dict[str, Any]:
    """Return an Observation whose subject is the first patient, and whose performers are the others."""
    subject = {"subject": {"reference": f"Patient/{patients[0]}"}} if patients else {}
    performers = [{"reference": f"Patient/{patient_id}"} for patient_id in patients[1:]]
    meta = {"meta": {"versionId": str(version)}}
    resource = {"resourceType": "Observation", "id": key, "status": "final", **meta, **subject}
    return {**resource, "performer": performers} if performers else resource


def consent(
    key: str, patient_id: str, provision: dict[str, Any], version: int = 1, status: str = "active"
) -> dict[str, Any]:
    """Return a privacy Consent of a patient."""
    return {
        "resourceType": "Consent",
        "id": key,
        "meta": {"versionId": str(version)},
        "status": status,
        "scope": {"coding": [{"code": "patient-privacy"}]},
        "patient": {"reference": f"Patient/{patient_id}"},
        "provision": provision,
    }
