"""A Consent that is a dead letter withholds what it may deny, until it is corrected, superseded or discarded."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fhir_assets.fhir.record import build_record, read_header
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.privacy.consent import ConsentGate, Policy
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.warehouse.ops import consents, dead_letters, encryption_secret, replays
from fhir_assets.warehouse.ops.dead_letters import DeadLetter, Selection
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.consent_resources import DAY, consent
from fhir_assets_tests.support.small_hospital import NOW, SmallHospital, build_patient

MRN = "urn:mrn"


@pytest.fixture(params=["without keys", "with keys"])
def hospital(request: pytest.FixtureRequest, database: str, tmp_path: Path) -> SmallHospital:
    cipher = Cipher(parse_keys([new_key()])) if request.param == "with keys" else Cipher()
    with connect(database) as conn:
        cipher = encryption_secret.unlock(conn, cipher)
    hospital = SmallHospital(database, tmp_path, cipher=cipher, gate=ConsentGate(Policy.OPT_OUT))
    load(hospital, *(build_patient(key, identifier=[{"system": MRN, "value": f"m{key}"}]) for key in "ab"))
    return hospital


def load(hospital: SmallHospital, *resources: dict[str, Any]) -> None:
    """Receive resources in one delivery, load the windows of their types, and apply consent, as the assets do."""
    with hospital.connect() as conn:
        deliveries = conn.execute("SELECT count(DISTINCT origin) FROM ops.received").fetchone()
    arrived = NOW + timedelta(seconds=deliveries[0] if deliveries else 0)
    bodies = [json.dumps(resource).encode() for resource in resources]
    records = [build_record(body, read_header(body), arrived) for body in bodies]
    hospital.receiver().receive(records, f"landing:{arrived}")
    for name in sorted({each["resourceType"] for each in resources}):
        with hospital.live_run("load"):
            hospital.validate("load", refresh=Refresh.MISSING, resource_type=name)
            hospital.apply_consent()
            hospital.load_tables("load", refresh=Refresh.MISSING, resource_type=name)
            hospital.apply_consent()


def build_denial(**fields: Any) -> dict[str, Any]:
    """Return a denial of patient ``a`` that is invalid, as it has no category."""
    denial = {**json.loads(consent("deny", DAY)), **fields}
    del denial["category"]
    return {name: value for name, value in denial.items() if value is not None}


def count_red(hospital: SmallHospital) -> int:
    with hospital.connect() as conn:
        return consents.count_dead_consents(conn)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="by id"),
        pytest.param({"patient": {"reference": "Patient/a/_history/2"}}, id="versioned"),
        pytest.param({"patient": {"identifier": {"system": MRN, "value": "ma"}}}, id="by identifier"),
        pytest.param({"patient": {"reference": f"Patient?identifier={MRN}|ma"}}, id="conditional"),
        pytest.param({"provision": {"type": "dney"}}, id="unreadable type"),
        pytest.param({"provision": ["deny"]}, id="unreadable provision"),
        pytest.param({"provision": {"type": "permit", "provision": [{}]}}, id="an exception without a type"),
        pytest.param({"status": "actve"}, id="unreadable status"),
        pytest.param({"status": None}, id="no status"),
        pytest.param({"scope": {"text": "?"}}, id="unreadable scope"),
    ],
)
def test_the_patient_of_a_denial_that_is_a_dead_letter_is_withheld(
    hospital: SmallHospital, fields: dict[str, Any]
) -> None:
    load(hospital, build_denial(**fields))
    assert count_red(hospital) == 1
    assert hospital.find_withheld() == {"a"}
    assert set(hospital.find_loaded()) == {"b"}
    load(hospital, build_patient("a", version=2))
    assert set(hospital.find_loaded()) == {"b"}


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"provision": {"type": "permit"}}, id="permit"),
        pytest.param({"status": "inactive"}, id="inactive"),
        pytest.param(
            {
                "scope": {
                    "coding": [
                        {"system": "http://terminology.hl7.org/CodeSystem/consentscope", "code": "treatment"},
                    ]
                }
            },
            id="another scope",
        ),
    ],
)
def test_what_cannot_be_a_denial_withholds_nothing_and_is_red(hospital: SmallHospital, fields: dict[str, Any]) -> None:
    load(hospital, build_denial(**fields))
    assert count_red(hospital) == 1
    assert hospital.find_withheld() == set()


@pytest.mark.parametrize("patient", [None, {"display": "A"}, {"reference": "urn:uuid:0f2a1c34"}])
def test_a_patient_who_cannot_be_read_holds_back_the_same_delivery(
    hospital: SmallHospital, patient: dict[str, Any] | None
) -> None:
    load(hospital, build_denial(patient=patient), build_patient("c"))
    assert hospital.find_withheld() == {"c"}
    assert set(hospital.find_loaded()) == {"a", "b"}


def test_text_that_is_no_json_withholds_every_patient_that_it_names(hospital: SmallHospital) -> None:
    text = json.dumps(build_denial()).encode()[:-30]
    letter = DeadLetter("Consent", None, "fetch", "json", "Consent.ndjson:1", "is no JSON", text, hospital.key)
    with hospital.connect() as conn:
        dead_letters.record(conn, "load", [letter])
    hospital.apply_consent()
    assert hospital.find_withheld() == {"a"}


def test_the_next_version_decides(hospital: SmallHospital) -> None:
    load(hospital, build_denial())
    later = {"versionId": "2", "lastUpdated": "2024-01-05T09:00:00Z"}
    load(hospital, {**json.loads(consent("permit", DAY)), "meta": later})
    assert count_red(hospital) == 0
    assert hospital.find_withheld() == set()
    assert set(hospital.find_loaded()) == {"a", "b"}


def test_a_discarded_dead_letter_withholds_nothing(hospital: SmallHospital) -> None:
    load(hospital, build_denial())
    with hospital.connect() as conn:
        [letter] = dead_letters.find(conn, Selection(resource_type="Consent"))
        replays.discard(conn, Selection(ids=[letter.id]), reason="a test", by="anna")
    hospital.apply_consent()
    assert hospital.find_withheld() == set()
    assert set(hospital.find_loaded()) == {"a", "b"}


def test_without_a_policy_nothing_is_withheld(database: str, tmp_path: Path) -> None:
    hospital = SmallHospital(database, tmp_path)
    load(hospital, build_patient("a"), build_denial())
    assert set(hospital.find_loaded()) == {"a"}
