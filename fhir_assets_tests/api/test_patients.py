"""Look-ups of patients that were received by the API and loaded by Dagster, with and without encryption."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import pytest

from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.record import Deletion
from fhir_assets.ingestion.runs import Ingestion
from fhir_assets.orchestration.instance.config import find_dagster_yaml
from fhir_assets.privacy.audit import Entry
from fhir_assets.privacy.keys import new_key
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.ops import audit_log
from fhir_assets.warehouse.postgres.db.connections import Session, normalise_url
from fhir_assets.warehouse.postgres.queries.patient_directory import PatientDirectory, PatientPage, PatientSearch
from fhir_assets.warehouse.postgres.tables import deletions
from fhir_assets_tests.support.api import TOKENS, Api, api_in_threads
from fhir_assets_tests.support.databases import fresh_database

CROWD = 23
V2_0203 = "http://terminology.hl7.org/CodeSystem/v2-0203"


def person(mrn: str, first: str, last: str, **more: Any) -> dict[str, Any]:
    return {"resourceType": "Patient", "mrn": mrn, "name": {"first": first, "last": last}, **more}


def visit(number: str, patient_id: str, day: str) -> dict[str, Any]:
    return {
        "resourceType": "Encounter",
        "id": f"visit-{number}",
        "identifier": [{"type": {"coding": [{"system": V2_0203, "code": "AN"}]}, "value": number}],
        "status": "finished",
        "class": {"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": "AMB"},
        "subject": {"reference": f"Patient/{patient_id}"},
        "period": {"start": day},
        "reasonCode": [{"text": f"Reason of {number}"}],
    }


@dataclass
class Clinic:
    """A running API with loaded patients. ``ids`` are the patient ids by the names of ``_load_patients``."""

    api: Api
    warehouse: Warehouse
    ids: dict[str, str]

    def search(self, query: str = "") -> dict[str, Any]:
        """Return the page of patients for a query string."""
        answer = self.api.get(f"/patients{query}", role="reader")
        assert answer.status_code == 200, answer.text
        content: dict[str, Any] = answer.json()
        return content

    def search_ids(self, query: str) -> list[str]:
        """Return the ids of the patients on the page for a query string."""
        return [patient["id"] for patient in self.search(query)["patients"]]

    def follow_pages(self, path: str) -> list[str]:
        """Return the patient ids of a page and of all pages after it, which ``next`` links to."""
        ids = []
        while path:
            content = self.api.get(path).json()
            ids += [patient["id"] for patient in content["patients"]]
            path = content["next"]
        return ids

    def audit_entries(self) -> list[Entry]:
        with self.warehouse.connect() as conn:
            return audit_log.find_latest(conn, limit=500)


@pytest.fixture(scope="module", params=["encrypted", "clear"])
def clinic(request: pytest.FixtureRequest, postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    home = tmp_path_factory.mktemp(request.param)
    with fresh_database(postgres) as database, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_POSTGRES_URL", normalise_url(database, "psycopg2"))
        patch.setenv("DAGSTER_EVENT_BATCH_SIZE", "100")
        settings = load_settings(
            db_url=database,
            fhir_assets_home=home,
            fhir_resource_types="Patient,Encounter,Consent",
            api_tokens=TOKENS,
            api_rate_limit=10_000,
            consent_policy="opt-out",
            phi_encryption_keys=new_key() if request.param == "encrypted" else None,
        )
        (home / "dagster").mkdir()
        shutil.copyfile(find_dagster_yaml(), home / "dagster" / "dagster.yaml")
        with api_in_threads(settings) as api, dg.DagsterInstance.from_config(str(home / "dagster")) as instance:
            yield _load_patients(api, instance)


def _load_patients(api: Api, instance: dg.DagsterInstance) -> Clinic:
    people = {
        "ada": person("MRN-1", "Ada Augusta", "Lovelace", birthDate="1815-12-10", gender="female", ssn="078-05-1120"),
        "byron": person("MRN-2", "George", "Byron"),
        "silent": person("MRN-3", "Emily", "Silent", consent={"data_sharing": False}),
        "gone": person("MRN-4", "Percy", "Gone"),
        **{f"crowd {n}": person(f"C-{n}", f"Crowd{n}", "Müller") for n in range(CROWD)},
    }
    answer = api.post("/api/v1/ingest", json={"records": list(people.values())}).json()
    assert answer["rejected"] == 0
    ids = {name: result["id"] for name, result in zip(people, answer["results"], strict=True)}
    visits = [visit("V1", ids["ada"], "2024-01-05"), visit("V2", ids["ada"], "2024-03-01T08:00:00Z")]
    visits.append(visit("V3", ids["silent"], "2024-03-01"))
    assert api.post("/api/v1/ingest", json={"records": visits}).json()["rejected"] == 0
    ingestion = Ingestion(api.settings, build_definitions(api.settings), instance)
    while waiting := ingestion.find_received():
        for windows in waiting:
            assert ingestion.load_received(windows, triggered_by="test").success
    warehouse = Warehouse(api.settings)
    deletions.apply_in_transaction(
        warehouse.connect, [Deletion("Patient", ids["gone"], datetime.now(UTC))], run_id="test"
    )
    return Clinic(api, warehouse, ids)


def test_a_social_security_number_is_searched_by_those_who_may(clinic: Clinic) -> None:
    for form in ("078-05-1120", "078051120"):
        answer = clinic.api.get(f"/patients?ssn={form}", role="registrar").json()
        assert (answer["total"], [patient["id"] for patient in answer["patients"]]) == (1, [clinic.ids["ada"]])
    assert clinic.api.get("/patients?ssn=078-05-1121", role="registrar").json()["total"] == 0
    assert clinic.api.get("/patients?ssn=078-05-1120&last_name=Byron", role="admin").json()["total"] == 0
    assert clinic.api.get("/patients?ssn=1120", role="registrar").status_code == 422
    page = clinic.api.get("/patients?ssn=078-05-1120&page_size=1", role="registrar").json()
    assert (len(page["patients"]), page["next"]) == (1, None)
    assert all(entry.audit_record.detail["by"] == "ssn" for entry in clinic.audit_entries()[:1])
    refused = clinic.api.get("/patients?ssn=078-05-1120", role="reader")
    assert refused.status_code == 403
    assert "1120" not in refused.text


def test_the_audit_log_is_read_page_by_page_and_the_reading_is_recorded(clinic: Clinic) -> None:
    ada = clinic.ids["ada"]
    clinic.api.get(f"/patients/{ada}", role="reader")
    path = f"/audit?about=Patient/{ada}&limit=1"
    newest = clinic.api.get(path, role="auditor").json()
    [record] = newest["records"]
    assert (record["actor"], record["resource_type"]) == ("api:reader", "Patient")
    assert record["action"] in ("read", "decrypt")
    older = clinic.api.get(f"{path}&before={newest['before']}", role="auditor").json()["records"]
    assert all(other["seq"] < record["seq"] for other in older)
    [reading] = clinic.api.get("/audit?limit=1").json()["records"]
    assert (reading["actor"], reading["resource_type"], reading["action"]) == ("api:auditor", "AuditEvent", "read")
    assert "Lovelace" not in clinic.api.get("/audit?limit=1000").text
    assert clinic.api.get("/audit?action=none").status_code == 422
    assert clinic.api.get("/audit?since=2999-01-01T00:00:00Z").json() == {"records": [], "before": None}


def test_numbers_are_kept_and_find_the_patient(clinic: Clinic) -> None:
    page = clinic.search("?page_size=10")["patients"]
    assert {patient["id"]: patient["number"] for patient in clinic.search("?page_size=10")["patients"]} == {
        patient["id"]: patient["number"] for patient in page
    }
    ada = clinic.api.get(f"/patients/{clinic.ids['ada']}").json()
    assert clinic.search(f"?number={ada['number']}")["patients"] == [ada]
    assert clinic.search_ids(f"?number={ada['visits'][0]['number']}") == []
    assert clinic.search_ids("?number=987654321") == []
    assert clinic.search(f"?number={ada['number']}&page_size=1")["next"] is None
    assert clinic.api.get("/patients?number=0").status_code == 422
    # The path takes FHIR ids only: those of many servers are integers too.
    assert clinic.api.get(f"/patients/{ada['number']}").status_code == 404


def test_a_patient_is_returned_with_all_visits_newest_first(clinic: Clinic) -> None:
    ada = clinic.ids["ada"]
    for path in (f"/patients/{ada}", f"/api/v1/patients/{ada}"):
        content = clinic.api.get(path, role="reader").json()
        for shown in (content, *content["visits"]):
            assert isinstance(shown.pop("number"), int)
            assert datetime.fromisoformat(shown.pop("created_at")) <= datetime.now(UTC)
        assert content == {
            "id": ada,
            "mrn": "MRN-1",
            "person": {
                "first_name": "Ada Augusta",
                "last_name": "Lovelace",
                "birth_date": "1815-12-10",
                "gender": "female",
                "deceased": None,
            },
            "visits": [
                {
                    "id": f"visit-{number}",
                    "visit_account_number": number,
                    "visit_date": day,
                    "status": "finished",
                    "reason": f"Reason of {number}",
                }
                for number, day in (("V2", "2024-03-01T08:00:00Z"), ("V1", "2024-01-05"))
            ],
        }


def test_patients_are_found_by_mrn_and_by_case_insensitive_names(clinic: Clinic) -> None:
    ada, byron = clinic.ids["ada"], clinic.ids["byron"]
    assert clinic.search("?mrn=MRN-1")["total"] == 1
    for query in (
        "?mrn=MRN-1",
        "?last_name=Lovelace",
        "?last_name=LOVELACE",
        "?first_name=ada",
        "?first_name=Ada Augusta",
        "?first_name=Ada&last_name=lovelace&mrn=MRN-1",
    ):
        assert clinic.search_ids(query) == [ada], query
    assert clinic.search_ids("?first_name=george") == [byron]
    for query in ("?mrn=mrn-1", "?mrn=MRN", "?first_name=Ada&last_name=Byron", "?last_name=Love%25", "?last_name='"):
        assert clinic.search(query) == {"total": 0, "page": 1, "page_size": 20, "patients": [], "next": None}, query


def test_pages_and_next_links_return_every_patient_once_in_the_same_order(clinic: Clinic) -> None:
    visible_ids = sorted(identity for name, identity in clinic.ids.items() if name not in ("silent", "gone"))
    pages = [clinic.search(f"?page={number}&page_size=7") for number in range(1, 6)]
    assert [patient["id"] for page in pages for patient in page["patients"]] == visible_ids
    assert {page["total"] for page in pages} == {len(visible_ids)}
    assert [page["page"] for page in pages] == [1, 2, 3, 4, 5]
    assert clinic.follow_pages("/patients?page_size=5") == visible_ids
    crowd = sorted(identity for name, identity in clinic.ids.items() if name.startswith("crowd"))
    assert clinic.follow_pages("/patients?page_size=4&last_name=m%C3%BCller") == crowd
    third = clinic.search("?page=3&page_size=5&last_name=M%C3%9CLLER")
    assert (third["total"], [patient["id"] for patient in third["patients"]]) == (CROWD, crowd[10:15])
    assert clinic.search("?page=100&last_name=M%C3%9CLLER")["total"] == CROWD


def test_a_page_begins_at_a_remembered_id_wherever_it_lies(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fhir_assets.warehouse.postgres.queries.patient_directory.STRIDE", 4)
    visible_ids = clinic.follow_pages("/patients?page_size=200")
    with clinic.warehouse.connect() as conn:
        pages = PatientDirectory(clinic.warehouse.connect)
        for size in (1, 3, 4, 5, 9):
            for number in range(1, len(visible_ids) // size + 3):
                page = pages.page(conn, number, size)
                assert list(page.ids) == visible_ids[(number - 1) * size : number * size]
                assert page.total == len(visible_ids)


def test_a_withheld_patient_is_refused_with_the_reason_and_not_listed(clinic: Clinic) -> None:
    answer = clinic.api.get(f"/patients/{clinic.ids['silent']}", role="reader")
    assert (answer.status_code, answer.json()["reason"]) == (403, "consent")
    assert clinic.search_ids("?mrn=MRN-3") == clinic.search_ids("?last_name=Silent") == []


def test_a_denial_takes_effect_before_it_is_applied_to_the_tables(clinic: Clinic) -> None:
    byron = clinic.ids["byron"]
    denial = (
        "INSERT INTO ops.consents (patient_id, purpose, decision, consent_id, basis)"
        " VALUES (%s, 'data-sharing', 'deny', 'c', 'Consent.provision')"
    )
    with clinic.warehouse.connect() as conn:
        conn.execute(denial, [byron])
    try:
        assert clinic.api.get(f"/patients/{byron}").status_code == 403
        assert clinic.search_ids("?mrn=MRN-2") == []
    finally:
        with clinic.warehouse.connect() as conn:
            conn.execute("DELETE FROM ops.consents WHERE patient_id = %s", [byron])
    assert clinic.api.get(f"/patients/{byron}").status_code == 200


def test_an_unknown_patient_is_404_and_a_deleted_patient_is_410(clinic: Clinic) -> None:
    assert clinic.api.get("/patients/nobody", role="reader").status_code == 404
    answer = clinic.api.get(f"/patients/{clinic.ids['gone']}", role="reader")
    assert (answer.status_code, answer.headers["Content-Type"]) == (410, "application/problem+json")
    assert clinic.search_ids("?mrn=MRN-4") == []


def test_every_read_of_a_patient_is_audited_with_the_token_name(clinic: Clinic) -> None:
    warehouse = clinic.warehouse
    ada, silent = clinic.ids["ada"], clinic.ids["silent"]
    with warehouse.connect() as conn:
        seq, _ = audit_log.get_head(conn)
        subjects = {name: audit_log.hash_subject(conn, "Patient", identity) for name, identity in clinic.ids.items()}
    request = clinic.api.get(f"/patients/{ada}", role="reader").headers["X-Request-ID"]
    clinic.api.get(f"/patients/{silent}", role="reader")
    clinic.search("?last_name=m%C3%BCller&page_size=200")
    clinic.search("?mrn=none")
    audit_records = [entry.audit_record for entry in reversed(clinic.audit_entries()) if entry.seq > seq]
    assert {audit_record.actor for audit_record in audit_records} == {"api:reader"}
    assert {audit_record.action for audit_record in audit_records} == {
        "decrypt" if warehouse.cipher().encrypts else "read"
    }
    assert audit_records[0].subject == subjects["ada"]
    assert audit_records[0].request_id == request
    assert (audit_records[1].subject, audit_records[1].detail) == (subjects["silent"], {"found": 0, "refused": True})
    crowd = {subject for name, subject in subjects.items() if name.startswith("crowd")}
    assert {audit_record.subject for audit_record in audit_records[2:-1]} == crowd
    assert (audit_records[-1].subject, audit_records[-1].detail) == (None, {"found": 0})
    with warehouse.connect() as conn:
        assert audit_log.find_fault(conn) is None


def test_no_patient_is_returned_if_the_audit_record_cannot_be_written(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("Lovelace")

    monkeypatch.setattr(audit_log, "record", refuse)
    for path in (f"/patients/{clinic.ids['ada']}", "/patients?mrn=MRN-1"):
        answer = clinic.api.get(path)
        assert answer.status_code == 500
        assert "Lovelace" not in answer.text


def test_names_are_case_sensitive_in_tables_without_the_search_columns(clinic: Clinic) -> None:
    with clinic.warehouse.connect() as conn, conn.transaction(force_rollback=True):
        conn.execute("ALTER TABLE fhir.patient DROP COLUMN given_search CASCADE, DROP COLUMN family_search CASCADE")
        directory = PatientDirectory(clinic.warehouse.connect)
        assert directory.find(conn, PatientSearch(family="Lovelace"), 1, 20).ids == (clinic.ids["ada"],)
        assert directory.find(conn, PatientSearch(family="lovelace"), 1, 20).ids == ()


def test_a_page_after_an_id_is_empty_without_a_patient_table(conn: Session) -> None:
    assert PatientDirectory(lambda: conn).page(conn, 1, 5, after="example") == PatientPage(0, ())
