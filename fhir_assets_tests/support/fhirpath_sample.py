"""Sample resources for tests of FHIRPath."""

from decimal import Decimal
from typing import Any

PATIENT: dict[str, Any] = {
    "resourceType": "Patient",
    "id": "p1",
    "active": True,
    "gender": "female",
    "birthDate": "1970-06",
    "_birthDate": {"extension": [{"url": "http://example.org/accuracy", "valueCode": "month"}]},
    "deceasedBoolean": False,
    "multipleBirthInteger": 2,
    "_maritalStatus": None,
    "name": [
        {
            "use": "official",
            "family": "Olsen",
            "given": ["Ann", None, "Bo"],
            "_given": [None, {"extension": [{"url": "http://example.org/masked", "valueBoolean": True}]}, None],
        },
        {"use": "usual", "given": ["Annie"]},
        {"use": "maiden", "family": "Berg", "period": {"end": "2002"}},
    ],
    "telecom": [{"system": "phone", "rank": 2, "_value": {"extension": [{"url": "x", "valueCode": "masked"}]}}],
    "contact": [{"name": {"family": "Kin"}, "telecom": [{"system": "email", "value": "a@b"}]}],
    "generalPractitioner": [{"reference": "Practitioner/d1"}, {"reference": "#inside"}],
    "managingOrganization": {"reference": "http://example.org/fhir/Organization/o1/_history/2"},
    "contained": [{"resourceType": "Practitioner", "id": "inside", "name": [{"family": "Inner"}]}],
    "extension": [
        {"url": "http://example.org/race", "extension": [{"url": "text", "valueString": "mixed"}]},
        {"url": "http://example.org/sex", "valueCode": "F"},
    ],
}
OBSERVATION: dict[str, Any] = {
    "resourceType": "Observation",
    "id": "o1",
    "status": "final",
    "code": {"coding": [{"system": "http://loinc.org", "code": "8867-4"}, {"code": "HR"}], "text": "Heart rate"},
    "effectiveDateTime": "2024-01-15T10:30:00+01:00",
    "valueQuantity": {"value": Decimal("1.50"), "unit": "mg", "code": "mg"},
    "component": [
        {"code": {"text": "a"}, "valueQuantity": {"value": 2.5, "code": "mg"}},
        {"code": {"text": "b"}, "valueString": "low"},
    ],
    "referenceRange": [{"low": {"value": 1, "code": "mg"}, "high": {"value": 3, "code": "mg"}}],
}
