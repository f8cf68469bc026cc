"""Changes of the source tables and the resources that the connector creates, updates and deletes for them."""

import uuid

import pytest
import requests

from fhir_assets.delivery.connector import dead_letters, outbox
from fhir_assets.delivery.connector.setup import load_sources
from fhir_assets.sandbox.faults import Fault, FaultKind, RequestKind
from fhir_assets_tests.support.hospital import MRN, Hospital

INSURER = "https://insurer.example.org"


def test_a_row_is_delivered_as_a_patient_resource(hospital: Hospital) -> None:
    patient = hospital.admit(
        "1", "Testperson", name_given="Ada", gender="F", birth_date="1972-03-28", phone_number="+1-555-0100",
        email="ada@example.org", address_line="1 Example Street", address_city="Springfield", address_state="MA",
        address_postal_code="02445", address_country="US", deceased_at="2024-02-03T04:05:06+01:00",
    )  # fmt: skip
    hospital.execute(
        "INSERT INTO health.patient_other_identifiers (patient_id, identifier_system, identifier_value)"
        " VALUES (%s, %s, 'M-77')", patient, INSURER,
    )  # fmt: skip
    hospital.deliver()
    resource = hospital.patients()["1"]
    del resource["id"], resource["meta"]
    assert resource == {
        "resourceType": "Patient",
        "identifier": [{"system": MRN, "value": "1"}, {"system": INSURER, "value": "M-77"}],
        "name": [{"family": "Testperson", "given": ["Ada"]}],
        "telecom": [{"system": "phone", "value": "+1-555-0100"}, {"system": "email", "value": "ada@example.org"}],
        "gender": "female",
        "birthDate": "1972-03-28",
        "deceasedDateTime": "2024-02-03T03:05:06+00:00",
        "address": [
            {"line": ["1 Example Street"], "city": "Springfield", "state": "MA", "postalCode": "02445", "country": "US"}
        ],
    }


def test_rows_of_one_transaction_are_one_request(hospital: Hospital) -> None:
    with hospital.connect() as conn:
        conn.execute("INSERT INTO health.patient (id, identifier_system, identifier_value) VALUES (7, %s, 'x')", [MRN])
        for n in range(3):
            conn.execute(
                "INSERT INTO health.patient_other_identifiers (patient_id, identifier_system, identifier_value)"
                " VALUES (7, %s, %s)", [INSURER, str(n)],
            )  # fmt: skip
        conn.execute("UPDATE health.patient SET name_family = 'Later' WHERE id = 7")
    hospital.deliver()
    assert hospital.server.stats()["requests"]["create"] == 1
    assert len(hospital.patients()["x"]["identifier"]) == 4
    assert hospital.execute("SELECT record_id, outcome FROM health.fhir_processed_event") == [("7", "created")]


def test_a_rolled_back_change_is_not_delivered(hospital: Hospital) -> None:
    with hospital.connect() as conn:
        conn.execute("INSERT INTO health.patient (identifier_system, identifier_value) VALUES (%s, 'x')", [MRN])
        conn.rollback()
    hospital.deliver()
    assert hospital.patients() == {}


def test_a_deleted_row_deletes_the_resource_on_the_server(hospital: Hospital) -> None:
    hospital.admit("1")
    hospital.admit("2")
    hospital.deliver()
    hospital.execute("DELETE FROM health.patient WHERE identifier_value = '1'")
    hospital.deliver()
    assert set(hospital.patients()) == {"2"}


def test_a_row_inserted_and_deleted_before_delivery_sends_no_update(hospital: Hospital) -> None:
    hospital.admit("1")
    hospital.execute("DELETE FROM health.patient")
    hospital.deliver()
    assert hospital.patients() == {}
    assert hospital.waiting() == 0
    assert "update" not in hospital.server.stats()["requests"]


def test_a_corrected_identifier_updates_the_same_resource(hospital: Hospital) -> None:
    hospital.admit("1", "Same")
    hospital.deliver()
    before = hospital.patients()["1"]["id"]
    hospital.execute("UPDATE health.patient SET identifier_value = '2'")
    hospital.deliver()
    assert {mrn: p["id"] for mrn, p in hospital.patients().items()} == {"2": before}


def test_swapped_identifiers_leave_each_row_with_its_own_resource(hospital: Hospital) -> None:
    for name in "ABC":
        hospital.admit(name.lower(), name)
    hospital.deliver()
    ids = {p["name"][0]["family"]: p["id"] for p in hospital.patients().values()}
    for statement in ("c' WHERE name_family = 'B", "b' WHERE name_family = 'A", "a' WHERE name_family = 'C"):
        mrn = statement[0]
        hospital.execute("UPDATE health.patient SET identifier_value = 'free' WHERE identifier_value = %s", mrn)
        hospital.execute(f"UPDATE health.patient SET identifier_value = '{statement}'")
        hospital.execute("UPDATE health.patient SET name_given = 'x' WHERE identifier_value = 'free'")
        hospital.execute("UPDATE health.patient SET identifier_value = %s WHERE identifier_value = 'free'", mrn + "2")
    hospital.deliver()
    rows = dict(hospital.execute("SELECT identifier_value, name_family FROM health.patient"))
    assert hospital.families() == rows
    assert {p["name"][0]["family"]: p["id"] for p in hospital.patients().values()} == ids


def test_a_new_row_with_the_identifier_of_a_deleted_row_replaces_its_content(hospital: Hospital) -> None:
    hospital.admit("1", "Old")
    hospital.deliver()
    hospital.execute("DELETE FROM health.patient")
    hospital.admit("1", "New")
    hospital.deliver()
    assert hospital.families() == {"1": "New"}


def test_a_patient_without_identifier_is_a_dead_letter_until_it_has_one(hospital: Hospital) -> None:
    patient = hospital.admit(None)
    hospital.deliver()
    assert hospital.dead() == [(str(patient), "no-identifier")]
    hospital.execute("UPDATE health.patient SET identifier_system = %s, identifier_value = '1'", MRN)
    hospital.deliver()
    assert hospital.dead() == []
    assert set(hospital.patients()) == {"1"}


def test_several_matches_are_a_permanent_failure(hospital: Hospital) -> None:
    for n in range(2):
        body = {"resourceType": "Patient", "identifier": [{"system": MRN, "value": "1"}], "id": f"twin{n}"}
        requests.put(f"{hospital.server.url}/Patient/twin{n}", json=body, timeout=10).raise_for_status()
    patient = hospital.admit("1")
    hospital.admit("2")
    hospital.deliver()
    assert hospital.dead() == [(str(patient), "several-matches")]
    for n in range(2):
        requests.delete(f"{hospital.server.url}/Patient/twin{n}", timeout=10).raise_for_status()
    with hospital.connect() as conn:
        assert dead_letters.replay(conn, None, reason="several-matches") == 1
        assert dead_letters.replay(conn, None) == 0
    hospital.deliver()
    assert hospital.dead() == []
    assert hospital.families() == {"1": "Test", "2": "Test"}


def test_a_row_that_gives_an_invalid_resource_is_a_dead_letter_with_the_rule(hospital: Hospital) -> None:
    hospital.admit("1", birth_date="0044-03-15 BC")
    hospital.deliver()
    [dead_letter] = hospital.execute("SELECT reason, message FROM health.fhir_dlq")
    assert dead_letter[0] == "invalid"
    assert "Patient.birthDate" in dead_letter[1]
    assert "0044" not in dead_letter[1]


def test_the_message_of_a_refusal_does_not_quote_the_response(hospital: Hospital) -> None:
    hospital.server.set_faults(Fault(kind=FaultKind.ERROR, status=422, on=frozenset({RequestKind.CREATE})))
    hospital.admit("1")
    hospital.deliver()
    [dead_letter] = hospital.execute("SELECT reason, message, http_status FROM health.fhir_dlq")
    assert dead_letter == ("refused", "the FHIR server answered 422: exception", 422)


def test_discarded_changes_stay_listed_and_are_not_replayed(hospital: Hospital) -> None:
    hospital.admit(None)
    hospital.deliver()
    with hospital.connect() as conn:
        [dead] = dead_letters.find(conn)
        assert dead_letters.discard(conn, [dead.id, dead.id + 99]) == 1
        assert dead_letters.find(conn) == []
        assert [dead_letter.id for dead_letter in dead_letters.find(conn, status="discarded")] == [dead.id]
        assert dead_letters.replay(conn, [dead.id]) == 0


@pytest.mark.parametrize("kind", [FaultKind.DROP, FaultKind.TRUNCATE])
def test_a_truncated_response_does_not_send_the_creation_twice(hospital: Hospital, kind: FaultKind) -> None:
    hospital.server.set_faults(Fault(kind=kind, on=frozenset({RequestKind.CREATE}), times=1))
    hospital.admit("1")
    hospital.deliver()
    assert hospital.server.stats()["requests"]["create"] == 1
    assert hospital.execute("SELECT outcome FROM health.fhir_processed_event") == [("found",)]
    assert hospital.patients()["1"]["meta"]["versionId"] == "1"


@pytest.mark.parametrize("kind", [FaultKind.ERROR, FaultKind.THROTTLE, FaultKind.RESET, FaultKind.HTML])
def test_transient_failures_are_retried(hospital: Hospital, kind: FaultKind) -> None:
    hospital.server.set_faults(Fault(kind=kind, times=3, retry_after=0))
    hospital.admit("1")
    hospital.deliver()
    assert set(hospital.patients()) == {"1"}
    assert hospital.dead() == []


def test_a_change_is_a_dead_letter_after_the_maximum_number_of_attempts(hospital: Hospital) -> None:
    hospital.server.set_faults(Fault(kind=FaultKind.ERROR))
    patient = hospital.admit("1")
    hospital.deliver(connector_max_attempts=3, connector_max_wait_seconds=0.05)
    assert hospital.dead() == [(str(patient), "attempts-used-up")]
    assert sum(hospital.server.stats()["requests"].values()) == 3


def test_existing_rows_are_delivered_when_enqueued(hospital: Hospital) -> None:
    hospital.admit("1")
    hospital.execute("DELETE FROM health.fhir_outbox")
    with hospital.connect() as conn:
        source = load_sources(hospital.settings)["patient"]
        assert outbox.enqueue_existing(conn, source) == 1
        assert outbox.enqueue_existing(conn, source) == 0
    hospital.deliver()
    assert set(hospital.patients()) == {"1"}


def test_an_identifier_with_special_characters_is_one_search_token(hospital: Hospital) -> None:
    value = f"a b&c=d#/é?{uuid.uuid4()}"
    hospital.admit(value)
    hospital.deliver()
    hospital.execute("UPDATE health.patient SET name_family = 'Changed'")
    hospital.deliver()
    assert hospital.families() == {value: "Changed"}
