"""References such as ``Patient?identifier=system|value`` get keys by what is loaded, through each channel."""

import json
from pathlib import Path
from typing import Any

import pytest

from fhir_assets.privacy.keys import new_key
from fhir_assets_tests.support.channels import CHANNELS, deploy_landing, encode
from fhir_assets_tests.support.consent_resources import DAY, resource
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.landing import LandingZone, land

MRN = "urn:mrn"
FINISHED = {"status": "finished", "class": {"code": "AMB"}}
VALUES = {
    "fhir_resource_types": "Patient,Encounter,Condition,Consent",
    "fhir_last_updated_gte": "2024-01-01",
    "fhir_partition": "monthly",
}


def build(kind: str, key: str, **fields: Any) -> dict[str, Any]:
    return dict(json.loads(resource(kind, key, DAY, **fields)))


def patient(key: str, *values: str, system: str | None = MRN, **fields: Any) -> dict[str, Any]:
    identifiers = [{"value": value} | ({"system": system} if system else {}) for value in values]
    return build("Patient", key, identifier=identifiers, **fields)


def condition(key: str, subject: str, **fields: Any) -> dict[str, Any]:
    return build("Condition", key, subject={"reference": subject}, code={"text": "x"}, **fields)


RESOURCES = [
    # Types whose names come before Patient are loaded before it, others after.
    patient("a", "1"),
    patient("b", "2", "twice"),
    patient("c", "twice"),
    patient("d", "a|b +c"),
    patient("e", "bare", system=None),
    build("Encounter", "v", **FINISHED, identifier=[{"system": MRN, "value": "visit"}]),
    condition("one", f"Patient?identifier={MRN}|1", encounter={"reference": f"Encounter?identifier={MRN}|visit"}),
    condition("encoded", "Patient?identifier=urn%3Amrn%7C2"),
    condition("odd", f"Patient?identifier={MRN}|a%7Cb%20+c"),
    condition("any-system", "Patient?identifier=2"),
    condition("no-system", "Patient?identifier=|bare"),
    condition("other-system", "Patient?identifier=|2"),
    condition("several", f"Patient?identifier={MRN}|twice"),
    condition("none", f"Patient?identifier={MRN}|nobody"),
    condition("more", f"Patient?identifier={MRN}|1&active=true"),
    condition("foreign", f"https://other.example/r4/Patient?identifier={MRN}|1"),
    build("Encounter", "w", **FINISHED, subject={"reference": f"Patient?identifier={MRN}|1"}),
]
EXPECTED = [
    ("any-system", "b", None),
    ("encoded", "b", None),
    ("foreign", None, None),
    ("more", None, None),
    ("no-system", "e", None),
    ("none", None, None),
    ("odd", "d", None),
    ("one", "a", "v"),
    ("other-system", None, None),
    ("several", None, None),
]


def keys(deployment: Deployment) -> list[tuple[Any, ...]]:
    return deployment.query("SELECT id, patient_key, encounter_key FROM fhir.condition ORDER BY id")


def keyless(deployment: Deployment) -> list[tuple[Any, ...]]:
    return deployment.query(
        "SELECT resource_type, form, count(*) FROM fhir.resource, unnest(keyless) form GROUP BY 1, 2 ORDER BY 1, 2"
    )


@pytest.mark.parametrize(
    "channel",
    ["files", "landing zone", *(pytest.param(each, marks=pytest.mark.slow) for each in ("search", "bulk", "post"))],
)
def test_one_match_among_what_is_loaded_makes_the_key_and_the_others_are_counted(
    deploy: Deploy, tmp_path: Path, channel: str
) -> None:
    deployment, faults = CHANNELS[channel](deploy, RESOURCES, tmp_path, VALUES)
    assert faults == []
    assert deployment.count_dead_letters() == {}
    assert keys(deployment) == EXPECTED
    assert deployment.query("SELECT id, patient_key FROM fhir.encounter ORDER BY id") == [("v", None), ("w", "a")]
    assert keyless(deployment) == [("Condition", "conditional Patient", 5)]
    members = "SELECT resource_type, id FROM fhir.resource WHERE patients[1] = 'a' ORDER BY 1, 2"
    assert deployment.query(members) == [("Condition", "one"), ("Encounter", "w"), ("Patient", "a")]


def land_each(deployment: Deployment, zone: LandingZone, *files: tuple[str, list[dict[str, Any]]]) -> None:
    for file, resources in files:
        zone.put(file, encode(resources))
        assert land(deployment) == []


@pytest.mark.parametrize("keys_are_set", [False, True])
def test_a_reference_waits_for_a_resource_that_comes_later(deploy: Deploy, tmp_path: Path, keys_are_set: bool) -> None:
    values = {**VALUES, "phi_encryption_keys": new_key()} if keys_are_set else VALUES
    deployment, zone = deploy_landing(deploy, tmp_path, **values)
    land_each(deployment, zone, ("1.ndjson", [condition("x", f"Patient?identifier={MRN}|1")]))
    assert keys(deployment) == [("x", None, None)]
    land_each(deployment, zone, ("2.ndjson", [patient("a", "1")]))
    assert keys(deployment) == [("x", "a", None)]
    assert keyless(deployment) == []
    stored = deployment.query("SELECT identifiers FROM fhir.resource")
    assert not [each for (found,) in stored for each in found if each == "1" or MRN in each]
