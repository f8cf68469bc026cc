"""Resources with our identifiers that somebody else made: they are never deleted and, by default, not updated."""

import json
from pathlib import Path

import pytest

from fhir_assets.delivery.connector import dead_letters, outbox
from fhir_assets.delivery.connector.mapping import BLANKS, BUILT_IN
from fhir_assets.delivery.connector.setup import load_sources
from fhir_assets_tests.support.hospital import MRN, Hospital
from fhir_assets_tests.support.patient_server import PatientServer
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply
from fhir_assets_tests.support.ward import Ward


def test_a_row_that_came_and_went_before_a_delivery_deletes_nothing(ward: Ward) -> None:
    ward.server.add("f", (MRN, "1"))
    ward.admit("1")
    ward.discharge()
    ward.deliver()
    assert ward.server.families() == {"f": "Foreign"}
    assert ward.reasons() == []


def test_a_foreign_resource_is_neither_updated_nor_deleted(ward: Ward) -> None:
    ward.server.add("f", (MRN, "1"))
    ward.admit("1")
    ward.deliver()
    assert ward.reasons() == ["foreign-resource"]
    ward.rename()
    ward.deliver()
    ward.discharge()
    ward.deliver()
    assert ward.server.families() == {"f": "Foreign"}
    assert ward.server.count("GET") == len(ward.server.requests)
    assert ward.reasons() == []


def test_a_foreign_resource_is_taken_over_if_the_setting_says_so(ward: Ward) -> None:
    ward.server.add("f", (MRN, "1"))
    ward.admit("1")
    ward.deliver(connector_take_over=True)
    assert ward.server.families() == {"f": "Ours"}
    ward.discharge()
    ward.deliver(connector_take_over=True)
    assert ward.server.families() == {}


@pytest.mark.parametrize("take_over", [False, True])
def test_a_row_with_several_matches_deletes_nothing(ward: Ward, take_over: bool) -> None:
    for name in ("f", "g"):
        ward.server.add(name, (MRN, "1"))
    ward.admit("1")
    ward.deliver(connector_take_over=take_over)
    assert ward.reasons() == ["several-matches"]
    ward.discharge()
    ward.deliver(connector_take_over=take_over)
    assert set(ward.server.families()) == {"f", "g"}
    assert ward.reasons() == []


@pytest.mark.parametrize("take_over", [False, True])
def test_a_foreign_twin_survives_updates_and_the_deletion_of_our_resource(ward: Ward, take_over: bool) -> None:
    ward.admit("1")
    ward.deliver(connector_take_over=take_over)
    [ours] = ward.server.patients
    ward.server.add("f", (MRN, "1"))
    ward.rename()
    ward.deliver(connector_take_over=take_over)
    assert ward.server.families() == {ours: "Changed", "f": "Foreign"}
    ward.discharge()
    ward.deliver(connector_take_over=take_over)
    assert ward.server.families() == {"f": "Foreign"}
    assert ward.reasons() == []


def test_a_former_identifier_deletes_nothing(ward: Ward) -> None:
    ward.admit("1")
    ward.deliver()
    ward.execute("UPDATE health.patient SET identifier_value = '2'")
    ward.server.add("f", (MRN, "1"))
    ward.deliver()
    assert sorted(ward.server.families().values()) == ["Foreign", "Ours"]
    ward.discharge()
    ward.deliver()
    ward.admit("3")
    ward.execute("UPDATE health.patient SET identifier_value = '4'")
    ward.server.add("g", (MRN, "3"))
    ward.discharge()
    ward.deliver()
    assert set(ward.server.families()) == {"f", "g"}


def test_a_resource_that_somebody_else_changed_is_not_deleted_but_a_dead_letter(ward: Ward) -> None:
    ward.admit("1")
    ward.deliver()
    [ours] = ward.server.patients
    ward.server.change(ours, gender="other")
    ward.discharge()
    ward.deliver()
    assert set(ward.server.patients) == {ours}
    assert ward.reasons() == ["changed-elsewhere"]
    ward.server.patients.clear()
    with ward.hospital.connect() as conn:
        dead_letters.replay(conn, None)
    ward.deliver()
    assert ward.reasons() == []


def test_a_resource_that_no_longer_has_the_identifier_is_not_deleted(ward: Ward) -> None:
    ward.admit("1")
    ward.deliver()
    [ours] = ward.server.patients
    ward.forget_contents()
    ward.server.change(ours, identifier=[{"system": MRN, "value": "9"}])
    ward.discharge()
    ward.deliver()
    assert set(ward.server.patients) == {ours}
    assert ward.reasons() == ["changed-elsewhere"]


def test_a_new_version_with_the_same_content_is_deleted_with_if_match(ward: Ward) -> None:
    ward.admit("1")
    ward.deliver()
    [ours] = ward.server.patients
    ward.server.change(ours, text={"status": "generated", "div": "<div/>"})
    ward.discharge()
    ward.deliver()
    assert ward.server.patients == {}
    assert ward.server.requests[-1].headers["If-Match"] == 'W/"2"'


def test_a_change_between_the_read_and_the_deletion_is_noticed(ward: Ward) -> None:
    ward.admit("1")
    ward.deliver()
    [ours] = ward.server.patients

    def change_once(request: ReceivedRequest) -> Reply | None:
        if request.method == "DELETE" and "gender" not in ward.server.patients[ours]:
            ward.server.change(ours, gender="other")
        return None

    ward.server.intercept = change_once
    ward.discharge()
    ward.deliver()
    assert set(ward.server.patients) == {ours}
    assert ward.reasons() == ["changed-elsewhere"]


def test_a_resource_that_is_gone_counts_as_deleted(ward: Ward) -> None:
    ward.admit("1")
    ward.deliver()
    ward.server.patients.clear()
    ward.discharge()
    ward.deliver()
    assert ward.server.count("DELETE") == 0
    assert ward.reasons() == []


def test_a_row_whose_resource_is_gone_does_not_take_a_foreign_one_instead(ward: Ward) -> None:
    def refuse_ids(request: ReceivedRequest) -> Reply | None:
        known = request.path.rpartition("/")[2] in ward.server.patients
        return Reply(status=405) if request.method == "PUT" and not request.query and not known else None

    ward.admit("1")
    ward.deliver()
    ward.server.patients.clear()
    ward.server.add("f", (MRN, "1"))
    ward.server.intercept = refuse_ids
    ward.rename()
    ward.deliver()
    assert ward.reasons() == ["foreign-resource"]
    ward.discharge()
    ward.deliver()
    assert ward.server.families() == {"f": "Foreign"}
    assert ward.reasons() == []


def test_rows_of_an_earlier_release_are_deleted_by_the_id_that_they_have(ward: Ward) -> None:
    ward.admit("1")
    ward.deliver()
    ward.forget_contents()
    ward.server.add("f", (MRN, "1"))
    ward.discharge()
    ward.deliver()
    assert set(ward.server.patients) == {"f"}


def test_an_unknown_id_is_looked_up_and_deleted_only_if_one_matches(ward: Ward) -> None:
    for mrn in "12":
        ward.admit(mrn)
    ward.deliver()
    ward.execute("UPDATE health.fhir_delivered SET resource_id = NULL")
    ward.server.add("f", (MRN, "2"))
    ward.discharge()
    ward.deliver()
    assert list(ward.server.identifiers().values()) == ["2", "2"]
    assert ward.reasons() == ["several-matches"]


def test_an_unknown_id_with_other_content_is_not_deleted(ward: Ward) -> None:
    ward.admit("1")
    ward.deliver()
    ward.execute("UPDATE health.fhir_delivered SET resource_id = NULL")
    ward.server.patients.clear()
    ward.server.add("f", (MRN, "1"))
    ward.discharge()
    ward.deliver()
    assert set(ward.server.patients) == {"f"}
    assert ward.reasons() == ["not-ours"]


def test_install_existing_learns_the_ids_that_an_earlier_release_did_not_record(ward: Ward) -> None:
    ward.admit("1")
    ward.deliver()
    [ours] = ward.server.patients
    ward.execute("UPDATE health.fhir_delivered SET resource_id = NULL")
    ward.forget_contents()
    with ward.hospital.connect() as conn:
        assert outbox.enqueue_existing(conn, load_sources(ward.hospital.settings)["patient"]) == 1
    ward.deliver()
    ward.server.add("f", (MRN, "1"))
    ward.discharge()
    ward.deliver()
    assert set(ward.server.patients) == {"f"}
    assert ours != "f"


@pytest.mark.parametrize("change", ["", "UPDATE health.patient SET identifier_value = '2'"])
def test_a_creation_whose_answer_was_lost_is_deleted_with_its_row(ward: Ward, change: str) -> None:
    ward.admit("1")
    ward.server.lose = 1
    ward.deliver(connector_max_attempts=1)
    assert ward.reasons() == ["attempts-used-up"]
    assert len(ward.server.patients) == 1
    if change:
        ward.execute(change)
    ward.discharge()
    ward.deliver()
    assert ward.server.patients == {}
    assert ward.reasons() == []


def test_a_creation_whose_answer_was_lost_is_continued_under_another_identifier(ward: Ward) -> None:
    ward.admit("1")
    ward.server.lose = 1
    ward.deliver(connector_max_attempts=1)
    [ours] = ward.server.patients
    ward.execute("UPDATE health.patient SET identifier_value = '2'")
    ward.server.add("f", (MRN, "1"))
    ward.deliver()
    assert ward.server.identifiers() == {ours: "2", "f": "1"}


@pytest.mark.parametrize("take_over", [False, True])
def test_our_resource_is_continued_although_a_foreign_one_has_the_new_identifier(ward: Ward, take_over: bool) -> None:
    ward.admit("1")
    ward.server.lose = 1
    ward.deliver(connector_max_attempts=1, connector_take_over=take_over)
    [ours] = ward.server.patients
    ward.server.add("f", (MRN, "2"))
    ward.execute("UPDATE health.patient SET identifier_value = '2'")
    ward.deliver(connector_take_over=take_over)
    if take_over:
        assert ward.server.identifiers() == {ours: "2", "f": "2"}
        assert ward.server.families()["f"] == "Foreign"
    else:
        assert ward.server.identifiers() == {ours: "1", "f": "2"}
        assert ward.reasons()[-1] == "foreign-resource"
    ward.discharge()
    ward.deliver(connector_take_over=take_over)
    assert ward.server.families() == {"f": "Foreign"}


@pytest.mark.parametrize("status", [200, 304, 412])
def test_a_foreign_resource_that_appears_after_the_search_is_not_overwritten(ward: Ward, status: int) -> None:
    def add_before_the_creation(request: ReceivedRequest) -> Reply | None:
        if request.method == "POST":
            ward.server.add("f", (MRN, "1"))
            return None if status == 200 else Reply(status=status)
        return None

    ward.server.intercept = add_before_the_creation
    ward.admit("1")
    ward.deliver()
    assert ward.server.families() == {"f": "Foreign"}
    assert ward.reasons() == ["several-matches" if status == 412 else "foreign-resource"]
    assert ward.hospital.execute("SELECT count(*) FROM health.fhir_sent") == [(0,)]
    ward.discharge()
    ward.deliver()
    assert ward.server.families() == {"f": "Foreign"}


def test_a_server_without_conditional_create_gets_conditional_updates(ward: Ward) -> None:
    ward.server.creates_conditionally = False
    ward.admit("1")
    ward.deliver()
    ward.rename()
    ward.deliver()
    assert (len(ward.server.families()), ward.reasons()) == (1, [])
    assert (ward.server.count("POST"), ward.server.count("PUT")) == (0, 2)
    ward.discharge()
    ward.deliver()
    assert ward.server.families() == {}


def test_a_server_that_does_not_know_if_none_exist_keeps_both_resources(ward: Ward) -> None:
    def forget_the_condition(request: ReceivedRequest) -> Reply | None:
        if request.method != "POST":
            return None
        ward.server.add("f", (MRN, "1"))
        stored = {**json.loads(request.body), "id": "ours", "meta": {"versionId": "1"}}
        ward.server.patients["ours"], ward.server.versions["ours"] = stored, 1
        return Reply(json.dumps(stored).encode(), status=201)

    ward.server.intercept = forget_the_condition
    ward.admit("1")
    ward.deliver()
    assert ward.server.families() == {"ours": "Ours", "f": "Foreign"}
    ward.rename()
    ward.discharge()
    ward.deliver()
    assert ward.server.families() == {"f": "Foreign"}
    assert ward.reasons() == []


@pytest.mark.parametrize("lost", [False, True])
def test_a_server_that_answers_200_to_a_creation(ward: Ward, lost: bool) -> None:
    def answer_200(request: ReceivedRequest) -> Reply | None:
        if request.method != "POST":
            return None
        answer = ward.server.execute(request)
        return Reply(b"" if lost else answer.body, status=500 if lost else 200)

    ward.server.intercept = answer_200
    ward.admit("1")
    ward.deliver(connector_max_attempts=1 + lost)
    assert list(ward.server.families().values()) == ["Ours"]
    assert ward.reasons() == []
    ward.discharge()
    ward.deliver()
    assert ward.server.families() == {}


@pytest.mark.parametrize("twin", [False, True])
def test_after_a_lost_answer_only_what_was_sent_is_deleted(ward: Ward, twin: bool) -> None:
    ward.admit("1")
    ward.server.lose = 1
    ward.deliver(connector_max_attempts=1)
    if not twin:
        ward.server.patients.clear()
    ward.server.add("f", (MRN, "1"))
    before = dict(ward.server.patients)
    ward.discharge()
    ward.deliver()
    assert ward.server.patients == before
    assert ward.reasons()[-1] == ("several-matches" if twin else "not-ours")


def test_an_update_whose_answer_was_lost_is_deleted_with_its_row(ward: Ward) -> None:
    ward.admit("1")
    ward.deliver()
    ward.rename()
    ward.server.lose = 1
    ward.deliver(connector_max_attempts=1)
    ward.discharge()
    ward.deliver()
    assert ward.server.patients == {}
    assert ward.reasons() == []


def test_a_request_that_was_refused_or_never_sent_leaves_nothing_to_look_for(ward: Ward) -> None:
    ward.server.intercept = lambda request: Reply(status=422) if request.method == "POST" else None
    ward.admit("1")
    ward.deliver()
    ward.server.intercept = lambda request: Reply(status=500)
    ward.admit("2")
    ward.deliver(connector_max_attempts=1)
    assert ward.reasons() == ["refused", "attempts-used-up"]
    assert ward.hospital.execute("SELECT count(*) FROM health.fhir_sent") == [(0,)]


def test_a_new_row_takes_over_what_a_deleted_row_has_left(ward: Ward) -> None:
    ward.admit("1", "Old")
    ward.server.lose = 1
    ward.deliver(connector_max_attempts=1)
    [ours] = ward.server.patients
    ward.discharge()
    ward.execute("DELETE FROM health.fhir_outbox")
    ward.admit("1", "New")
    ward.deliver()
    assert ward.server.families() == {ours: "New"}


@pytest.mark.parametrize("confirmed", [False, True])
def test_the_deletion_of_a_row_leaves_what_another_row_has_made_of_its_resource(ward: Ward, confirmed: bool) -> None:
    deleted = ward.admit("1", "Old")
    ward.server.lose = 0 if confirmed else 1
    ward.deliver(connector_max_attempts=1)
    [ours] = ward.server.patients
    ward.discharge()
    ward.execute("DELETE FROM health.fhir_outbox WHERE processed_at IS NULL")
    ward.admit("1", "New")
    ward.server.lose = 1
    ward.deliver(connector_max_attempts=1)
    assert ward.server.families() == {ours: "New"}
    ward.execute(
        "INSERT INTO health.fhir_outbox (source, record_id, table_name, operation)"
        " VALUES ('patient', %s, 'patient', 'DELETE')", str(deleted),
    )  # fmt: skip
    ward.deliver()
    assert ward.server.families() == {ours: "New"}
    assert ward.reasons() == ["attempts-used-up"]
    ward.rename()
    ward.deliver()
    assert ward.server.families() == {ours: "Changed"}
    assert ward.reasons() == []
    ward.discharge()
    ward.deliver()
    assert ward.server.families() == {}


@pytest.mark.parametrize("mrn", ["7 ", " 7", "7\u00a0", "\u3000 7\t", "a,b|c$d\\e ", "\u00a0a\\", "7\ufeff"])
def test_what_is_asked_and_what_is_sent_are_one_value(ward: Ward, mrn: str) -> None:
    ward.admit(mrn)
    ward.deliver()
    ward.rename()
    ward.deliver()
    [patient] = ward.server.patients.values()
    assert patient["identifier"] == [{"system": MRN, "value": mrn.strip(BLANKS)}]
    assert patient["name"] == [{"family": "Changed"}]
    ward.execute("UPDATE health.patient SET identifier_value = identifier_value || ' '")
    ward.deliver()
    assert len(ward.server.patients) == 1
    ward.discharge()
    ward.deliver()
    assert ward.server.patients == {}
    assert ward.reasons() == []


def test_a_second_row_with_the_same_identifier_but_for_blanks_is_a_dead_letter(ward: Ward) -> None:
    ward.admit("1", "First")
    ward.deliver()
    ward.admit("1 ", "Second")
    ward.deliver()
    assert list(ward.server.families().values()) == ["First"]
    assert ward.reasons() == ["identifier-of-another-row"]
    ward.execute("DELETE FROM health.patient WHERE name_family = 'First'")
    ward.deliver()
    with ward.hospital.connect() as conn:
        dead_letters.replay(conn, None)
    ward.deliver()
    assert list(ward.server.families().values()) == ["Second"]


def test_the_database_and_the_mapping_remove_the_same_blanks(hospital: Hospital) -> None:
    characters = "".join(chr(code) for code in range(1, 0xD800)) + "\ufeff"
    cleaned = hospital.execute(
        "SELECT string_agg(c, '' ORDER BY n) FROM unnest(string_to_array(%s, NULL)) WITH ORDINALITY AS t (c, n)"
        " WHERE health.fhir_clean(c) = ''",
        characters,
    )
    assert set(cleaned[0][0]) == set(BLANKS)


def test_a_mapping_that_does_not_send_the_identifier_is_a_dead_letter(ward: Ward, tmp_path: Path) -> None:
    mapping = json.loads(BUILT_IN.read_text())
    mapping["sources"][0]["resource"]["identifier"] = [{"system": "urn:other", "value": "$identifier_value"}]
    (tmp_path / "mapping.json").write_text(json.dumps(mapping))
    ward.admit("1")
    ward.deliver(connector_mapping=tmp_path / "mapping.json")
    assert ward.reasons() == ["identifier-not-sent"]
    assert ward.server.requests == []


def test_an_id_of_one_server_means_nothing_on_another(ward: Ward) -> None:
    for mrn in "12":
        ward.admit(mrn)
    ward.deliver()
    with PatientServer() as other:
        for resource_id in ward.server.patients:
            other.add(resource_id, (MRN, f"of-{resource_id}"))
        ward.execute("UPDATE health.patient SET name_family = 'Changed' WHERE identifier_value = '1'")
        ward.execute("DELETE FROM health.patient WHERE identifier_value = '2'")
        ward.hospital.deliver(fhir_base_url=other.url)
        assert sorted(other.families().values()) == ["Changed", "Foreign", "Foreign"]
        assert ward.reasons() == []


def test_the_same_server_under_another_address_keeps_its_resources(ward: Ward) -> None:
    ward.admit("1")
    ward.deliver()
    [ours] = ward.server.patients
    ward.rename()
    ward.hospital.deliver(fhir_base_url=ward.server.url.replace("127.0.0.1", "localhost"))
    assert ward.server.families() == {ours: "Changed"}


def test_a_search_that_the_server_does_not_understand_creates_nothing(ward: Ward) -> None:
    page = {
        "resourceType": "Bundle",
        "type": "searchset",
        "link": [{"relation": "next", "url": f"{ward.server.url}/next"}],
        "entry": [{"resource": {"resourceType": "Patient", "id": "f", "identifier": [{"value": "9"}]}}],
    }
    ward.server.intercept = lambda request: Reply(json.dumps(page).encode()) if request.method == "GET" else None
    ward.admit("1")
    ward.deliver()
    assert ward.reasons() == ["not-searchable"]
    assert ward.server.count("GET") == len(ward.server.requests)
