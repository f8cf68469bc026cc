"""Resources of a patient and the Consent about them."""

import json
from datetime import UTC, datetime
from typing import Any

from fhir_assets_tests.support.content import instant

DAY = datetime(2024, 1, 5, tzinfo=UTC)


def resource(kind: str, identity: str, moment: datetime, *, version: str = "1", **fields: Any) -> bytes:
    """Return a resource with its ``meta`` as JSON."""
    meta = {"versionId": version, "lastUpdated": instant(moment)}
    return json.dumps({"resourceType": kind, "id": identity, "meta": meta, **fields}).encode()


def observation(identity: str, about: str) -> bytes:
    """Return an Observation of a patient."""
    subject = {"reference": f"Patient/{about}"}
    return resource("Observation", identity, DAY, status="final", code={"text": "x"}, subject=subject)


def consent(provision_type: str, moment: datetime, *, version: str = "1", status: str = "active") -> bytes:
    """Return the Consent of patient ``a``. ``provision_type`` is ``permit`` or ``deny``."""
    return resource(
        "Consent",
        "c",
        moment,
        version=version,
        status=status,
        scope={"coding": [{"system": "http://terminology.hl7.org/CodeSystem/consentscope", "code": "patient-privacy"}]},
        category=[{"coding": [{"code": "59284-0"}]}],
        policyRule={"coding": [{"code": "OPTIN"}]},
        patient={"reference": "Patient/a"},
        provision={"type": provision_type},
    )
