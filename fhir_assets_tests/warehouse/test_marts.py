"""The views of schema marts: their rows, their rights, and how they follow changes of the tables."""

import re
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.errors import ViewError
from fhir_assets.fhir.record import Record
from fhir_assets.fhir.views import View, ViewSet, parse_view
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.warehouse.ops import encryption_secret
from fhir_assets.warehouse.postgres.db import roles
from fhir_assets.warehouse.postgres.db.connections import Session, connect
from fhir_assets.warehouse.postgres.tables import marts, view_tables
from fhir_assets_tests.support.shipped_views import views, views_of_type
from fhir_assets_tests.support.views import load, select

DOCS = Path(__file__).resolve().parents[2] / "docs" / "tables.md"
MOMENT = datetime(2024, 1, 1, tzinfo=UTC)
OF_PATIENT = {"patient_current", "patients", "persons"}
LOINC, LAB = "http://loinc.org", "http://terminology.hl7.org/CodeSystem/observation-category"


@pytest.fixture(params=["without keys", "with keys"])
def session(request: pytest.FixtureRequest, database: str) -> Iterator[Session]:
    """A connection without keys, and a connection with keys."""
    cipher = NO_ENCRYPTION
    if request.param == "with keys":
        with connect(database) as conn:
            cipher = encryption_secret.unlock(conn, Cipher(parse_keys([new_key()])))
    with connect(database, cipher=cipher) as conn:
        yield conn


def store(conn: Session, resource_type: str, **bodies: dict[str, Any]) -> None:
    """Load resources of one type by id, with all views of the type."""
    records = [
        Record(
            resource_type, key, "1", MOMENT, MOMENT, orjson.dumps({"resourceType": resource_type, "id": key, **body})
        )
        for key, body in bodies.items()
    ]
    _, unloadable = load(conn, *records, views=tuple(views_of_type(resource_type)))
    assert unloadable == []


def ids(conn: Session, mart: str) -> set[str]:
    return {key for (key,) in select(conn, f"SELECT id FROM marts.{mart}")}


def coded(code: str, system: str = LOINC) -> dict[str, Any]:
    return {"coding": [{"system": system, "code": code}]}


def status(value: str) -> dict[str, Any]:
    return coded(value, "http://terminology.hl7.org/CodeSystem/condition-clinical")


def test_age_and_death_of_patients(conn: Session) -> None:
    today = date.today()
    years_ago = today.replace(year=today.year - 40, day=min(today.day, 28))
    store(
        conn,
        "Patient",
        alive={"birthDate": years_ago.isoformat()},
        tomorrow={"birthDate": f"{today.year + 1}-01-01"},
        died={"birthDate": "1950-06-15", "deceasedDateTime": "2020-06-14T23:30:00-05:00"},
        flag={"birthDate": "1950", "deceasedBoolean": True},
        stated={"deceasedBoolean": False},
    )
    rows = select(conn, "SELECT id, alive, age, age_is_exact, _source FROM marts.patient_current ORDER BY id")
    assert {key: rest for key, *rest in rows} == {
        "alive": [True, 40, True, "default"],
        "died": [False, 69, True, "default"],
        "flag": [False, None, False, "default"],
        "stated": [True, None, False, "default"],
        "tomorrow": [True, None, True, "default"],
    }


def test_blood_pressures_of_panels_and_of_observations_of_their_own(conn: Session) -> None:
    def quantity(value: float) -> dict[str, Any]:
        return {"valueQuantity": {"value": value, "unit": "mmHg", "code": "mm[Hg]"}}

    panel = {
        "status": "final",
        "code": coded("85354-9"),
        "component": [
            {"code": coded("8462-4"), **quantity(80)},
            {"code": coded("8480-6"), **quantity(120)},
            {"code": coded("8480-6"), **quantity(130)},
            {"code": coded("8867-4"), **quantity(60)},
        ],
    }
    store(
        conn,
        "Observation",
        panel=panel,
        wrong={**panel, "status": "entered-in-error"},
        alone={"code": coded("8480-6"), **quantity(140)},
        half={"status": "final", "code": coded("85354-9"), "component": [{"code": coded("8462-4"), **quantity(70)}]},
        unknown={"status": "final", "code": coded("85354-9"), "component": [{"code": coded("8462-4")}]},
        pulse={"status": "final", "code": coded("8867-4"), **quantity(60)},
    )
    rows = select(conn, "SELECT id, systolic, diastolic, unit FROM marts.blood_pressure")
    assert set(rows) == {
        ("panel", Decimal(120), Decimal(80), "mm[Hg]"),
        ("alone", Decimal(140), None, "mm[Hg]"),
        ("half", None, Decimal(70), "mm[Hg]"),
    }


def test_the_last_lab_of_each_patient_and_code(conn: Session) -> None:
    def lab(patient: str, loinc: str, day: str | None, **more: Any) -> dict[str, Any]:
        body = {
            "status": "final",
            "code": coded(loinc),
            "subject": {"reference": f"Patient/{patient}"},
            "category": [{"text": "other"}, coded("laboratory", LAB)],
        }
        return {**body, **({"effectiveDateTime": day} if day else {}), **more}

    store(
        conn,
        "Observation",
        old=lab("a", "1", "2024-01-01"),
        new=lab("a", "1", "2024-02-01"),
        undated=lab("a", "1", None),
        wrong=lab("a", "1", "2024-03-01", status="entered-in-error"),
        cancelled=lab("a", "1", "2024-03-01", status="cancelled"),
        other=lab("a", "2", "2023-01-01"),
        local=lab("a", "2", "2023-01-01", code=coded("2", "http://local.example")),
        nothing=lab("b", "1", None, status=None),
        vital=lab("a", "3", "2024-01-01", category=[coded("vital-signs", LAB)]),
        nobody=lab("a", "4", "2024-01-01", subject={"display": "?"}),
    )
    assert ids(conn, "last_lab") == {"new", "other", "local", "nothing"}
    assert ids(conn, "last_vital_sign") == {"vital"}
    assert "wrong" not in ids(conn, "observation_valid")
    assert "nothing" in ids(conn, "observation_valid")


def test_what_was_entered_in_error_is_left_out_and_an_unknown_status_is_kept(session: Session) -> None:
    period = {"start": "2024-01-01T10:00:00Z", "end": "2024-01-01T11:30:00Z"}
    store(session, "Encounter", a={"status": "finished", "period": period}, b={}, c={"status": "entered-in-error"})
    assert ids(session, "encounter_valid") == {"a", "b"}
    assert ("a", "01:30:00") in select(session, "SELECT id, duration::text FROM marts.encounter_valid")
    store(
        session,
        "Procedure",
        a={"status": "completed"},
        b={},
        c={"status": "entered-in-error"},
        d={"status": "not-done"},
    )
    assert ids(session, "procedure_valid") == {"a", "b"}
    store(session, "Immunization", a={"status": "completed"}, b={}, c={"status": "not-done"})
    assert ids(session, "immunization_given") == {"a", "b"}


def test_conditions_and_allergies_that_patients_have_now(session: Session) -> None:
    error = coded("entered-in-error", "http://terminology.hl7.org/CodeSystem/condition-ver-status")
    bodies: dict[str, dict[str, Any]] = {
        "active": {"clinicalStatus": status("active")},
        "relapse": {"clinicalStatus": status("relapse")},
        "resolved": {"clinicalStatus": status("resolved")},
        "wrong": {"clinicalStatus": status("active"), "verificationStatus": error},
        "unknown": {},
    }
    store(session, "Condition", **bodies, ended={"abatementDateTime": "2020"}, told={"abatementString": "as a child"})
    assert ids(session, "condition_current") == {"active", "relapse", "unknown"}
    assert ids(session, "condition_valid") == {"active", "relapse", "resolved", "unknown", "ended", "told"}
    store(session, "AllergyIntolerance", **bodies)
    assert ids(session, "allergy_current") == {"active", "relapse", "unknown"}


def test_active_medications_of_requests_and_statements_with_the_code_of_their_medication(session: Session) -> None:
    rxnorm = "http://www.nlm.nih.gov/research/umls/rxnorm"
    store(session, "Medication", m={"code": coded("11", rxnorm)})
    reference = {"medicationReference": {"reference": "Medication/m"}}
    store(
        session,
        "MedicationRequest",
        a={"status": "active", **reference},
        b={"medicationCodeableConcept": coded("22", rxnorm)},
        c={"status": "stopped", **reference},
        d={"status": "active", "doNotPerform": True, **reference},
    )
    store(session, "MedicationStatement", s={"status": "active", **reference}, t={"status": "completed", **reference})
    rows = select(session, "SELECT type, id, rxnorm_code FROM marts.medication_active")
    assert set(rows) == {
        ("MedicationRequest", "a", "11"),
        ("MedicationRequest", "b", "22"),
        ("MedicationStatement", "s", "11"),
    }


def list_marts(conn: Session) -> set[str]:
    return {name for (name,) in select(conn, "SELECT viewname FROM pg_views WHERE schemaname = 'marts'")}


def test_all_marts_exist_when_all_tables_do_and_are_described(session: Session) -> None:
    view_tables.ensure_tables(session, views().values())
    session.commit()
    names = {mart.name for mart in marts.read_marts()}
    assert list_marts(session) == names
    assert view_tables.refresh_marts(session) == {}
    described = select(
        session,
        "SELECT relname FROM pg_class WHERE relnamespace = 'marts'::regnamespace AND obj_description(oid) IS NOT NULL",
    )
    assert {name for (name,) in described} == names
    text = DOCS.read_text()
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []
    for mart in marts.read_marts():
        assert {"_source", *(name for name, _ in mart.columns)} <= columns_of(session, f"marts.{mart.name}")


def test_patients_persons_and_visits(conn: Session) -> None:
    v2_0203 = "http://terminology.hl7.org/CodeSystem/v2-0203"

    def identified(code: str, value: str) -> dict[str, Any]:
        return {"type": coded(code, v2_0203), "value": value}

    name = {"family": "Lovelace", "given": ["Ada", "Augusta"]}
    store(
        conn,
        "Patient",
        a={"identifier": [identified("MR", "M-1")], "name": [name], "birthDate": "1815-12-10", "gender": "female"},
    )
    visit = {
        "status": "finished",
        "identifier": [identified("VN", "other"), identified("AN", "V-1"), identified("AN", "V-2")],
        "subject": {"reference": "Patient/a"},
        "period": {"start": "2024-03-01T23:30:00-05:00"},
        "reasonCode": [{"text": "cough"}],
    }
    store(conn, "Encounter", e={**visit, "class": coded("AMB")["coding"][0]}, wrong={"status": "entered-in-error"})
    [(created, *patient)] = select(
        conn, "SELECT created_at, id, mrn, _source, updated_at >= created_at FROM marts.patients"
    )
    assert created is not None
    assert patient == ["a", "M-1", "default", True]
    assert select(conn, "SELECT patient_id, first_name, last_name, birth_date, gender, alive FROM marts.persons") == [
        ("a", "Ada Augusta", "Lovelace", date(1815, 12, 10), "female", True)
    ]
    assert select(
        conn,
        "SELECT id, patient_id, visit_account_number, visit_date, reason, created_at IS NOT NULL FROM marts.visits",
    ) == [("e", "a", "V-1", date(2024, 3, 1), "cough", True)]


def test_a_new_version_keeps_the_time_when_the_resource_was_created(conn: Session) -> None:
    def select_created() -> datetime:
        [(created,)] = select(conn, "SELECT created_at FROM marts.patients")
        assert isinstance(created, datetime)
        return created

    store(conn, "Patient", a={"gender": "female"})
    conn.commit()
    first = select_created()
    newer = datetime(2024, 1, 2, tzinfo=UTC)
    body = orjson.dumps({"resourceType": "Patient", "id": "a", "gender": "male"})
    load(conn, Record("Patient", "a", "2", newer, newer, body), views=tuple(views_of_type("Patient")))
    conn.commit()
    assert select(conn, "SELECT gender FROM marts.persons") == [("male",)]
    assert select_created() == first


def test_a_reader_may_read_the_marts(session: Session) -> None:
    store(session, "Patient", a={"birthDate": "1980"})
    session.execute("SET LOCAL ROLE fhir_reader")
    assert select(session, "SELECT id FROM marts.patient_current") == [("a",)]
    session.rollback()


def test_a_deleted_patient_leaves_the_mart(conn: Session) -> None:
    store(conn, "Patient", a={}, b={})
    conn.execute("DELETE FROM fhir.patient WHERE id = 'a'")
    assert ids(conn, "patient_current") == {"b"}


def without(view: View, *names: str) -> View:
    """Return a shipped view without some of its columns."""

    def cut(select: dict[str, Any]) -> dict[str, Any]:
        kept = [column for column in select.get("column", []) if column["name"] not in names]
        nested = [cut(inner) for inner in select.get("select", [])]
        return {**select, **({"column": kept} if kept else {}), **({"select": nested} if nested else {})}

    definition = orjson.loads(orjson.dumps(view.definition))
    return parse_view({**definition, "select": [cut(select) for select in definition["select"]]})


def columns_of(conn: Session, mart: str) -> set[str]:
    rows = select(conn, f"SELECT attname FROM pg_attribute WHERE attrelid = to_regclass('{mart}') AND attnum > 0")
    return {name for (name,) in rows}


def test_a_dropped_column_does_not_end_in_depends_on(conn: Session) -> None:
    view_tables.ensure_tables(conn, views_of_type("Patient"))
    assert "multiple_birth_boolean" in columns_of(conn, "marts.patient_current")
    smaller = without(views()["patient"], "multiple_birth_boolean")
    view_tables.apply_changes(conn, [smaller])
    assert "multiple_birth_boolean" not in columns_of(conn, "marts.patient_current")
    assert {"alive", "age"} <= columns_of(conn, "marts.patient_current")


def test_a_new_column_appears_in_the_mart(conn: Session) -> None:
    smaller = without(views()["patient"], "multiple_birth_boolean")
    view_tables.ensure_tables(conn, [smaller])
    assert "multiple_birth_boolean" not in columns_of(conn, "marts.patient_current")
    view_tables.ensure_tables(conn, [views()["patient"]])
    assert "multiple_birth_boolean" in columns_of(conn, "marts.patient_current")


def test_a_mart_whose_column_is_gone_is_named_and_made_again_when_it_is_back(conn: Session) -> None:
    view_tables.ensure_tables(conn, [views()["patient"]])
    view_tables.apply_changes(conn, [without(views()["patient"], "deceased_boolean")])
    conn.commit()
    assert list_marts(conn) == {"patients"}
    assert re.search("deceased_boolean does not exist", view_tables.refresh_marts(conn)["patient_current"])
    view_tables.ensure_tables(conn, [views()["patient"]])
    conn.commit()
    assert list_marts(conn) == OF_PATIENT
    assert view_tables.refresh_marts(conn) == {}


def test_somebodys_view_on_a_mart_is_named_and_survives_a_new_column(conn: Session) -> None:
    smaller = without(views()["patient"], "multiple_birth_boolean")
    view_tables.ensure_tables(conn, [smaller])
    conn.execute("CREATE VIEW public.adults AS SELECT id FROM marts.patient_current WHERE age >= 18")
    conn.commit()
    view_tables.ensure_tables(conn, [views()["patient"]])
    conn.commit()
    assert "adults" in view_tables.refresh_marts(conn)["patient_current"]
    with pytest.raises(ViewError, match=r"view adults depends on view marts.patient_current.*--cascade"):
        view_tables.apply_changes(conn, [smaller])
    conn.rollback()
    view_tables.apply_changes(conn, [smaller], cascade=True)
    conn.commit()
    assert select(conn, "SELECT to_regclass('public.adults')") == [(None,)]
    assert list_marts(conn) == OF_PATIENT


def test_a_mart_that_was_dropped_or_changed_is_made_again(conn: Session) -> None:
    view_tables.ensure_tables(conn, [views()["patient"]])
    conn.execute("DROP VIEW marts.patient_current")
    conn.commit()
    assert view_tables.refresh_marts(conn) == {}
    assert list_marts(conn) == OF_PATIENT
    conn.execute("UPDATE ops.marts SET definition = 'of an earlier version'")
    conn.commit()
    [(before,)] = select(conn, "SELECT 'marts.patient_current'::regclass::oid")
    view_tables.refresh_marts(conn)
    [(after,)] = select(conn, "SELECT 'marts.patient_current'::regclass::oid")
    assert before != after


MINE = "CREATE VIEW marts.patient_current AS SELECT id, multiple_birth_boolean AS twin FROM fhir.patient"


@pytest.mark.parametrize("kind", ["VIEW", "MATERIALIZED VIEW", "TABLE"])
def test_a_relation_of_a_user_with_the_name_of_a_mart_stays_and_the_mart_is_made_when_it_is_renamed(
    conn: Session, kind: str
) -> None:
    conn.execute(f"CREATE {kind} marts.patient_current AS SELECT 1 AS mine".encode())
    view_tables.ensure_tables(conn, [views()["patient"]])
    view_tables.refresh_marts(conn)
    roles.grant_rights(conn)
    refused = view_tables.refresh_marts(conn, retry_refused=True)
    assert re.search("fhir_assets did not create: rename it.*`fhir-assets migrate`", refused["patient_current"])
    assert columns_of(conn, "marts.patient_current") == {"mine"}
    conn.execute(f"ALTER {kind} marts.patient_current RENAME TO my_patients".encode())
    assert view_tables.refresh_marts(conn, retry_refused=True) == {}
    assert {"alive", "age"} <= columns_of(conn, "marts.patient_current")


def test_the_view_of_a_user_with_the_name_of_a_mart_is_not_dropped_with_the_marts_of_a_table(conn: Session) -> None:
    assert {mart.name for mart in marts.read_marts() if "patient" in mart.tables} == OF_PATIENT
    view_tables.ensure_tables(conn, [views()["patient"]])
    conn.execute("DROP VIEW marts.patient_current; DELETE FROM ops.marts; " + MINE)
    conn.commit()
    smaller = without(views()["patient"], "multiple_birth_boolean")
    with pytest.raises(ViewError, match=r"view marts.patient_current depends on"):
        view_tables.apply_changes(conn, [smaller])
    conn.rollback()
    assert columns_of(conn, "marts.patient_current") == {"id", "twin"}


def test_a_refused_mart_is_tried_again_by_migrate_and_when_somebody_has_dropped_it(conn: Session) -> None:
    view_tables.ensure_tables(conn, [without(views()["patient"], "multiple_birth_boolean")])
    conn.execute("CREATE VIEW public.adults AS SELECT id FROM marts.patient_current WHERE age >= 18")
    view_tables.ensure_tables(conn, [views()["patient"]])
    conn.commit()
    assert "adults" in view_tables.refresh_marts(conn, retry_refused=True)["patient_current"]
    conn.execute("DROP VIEW public.adults")
    assert view_tables.refresh_marts(conn, retry_refused=True) == {}
    assert "multiple_birth_boolean" in columns_of(conn, "marts.patient_current")
    conn.execute(
        """
        UPDATE ops.marts SET refused = 'it is unchanged' WHERE name = 'patient_current';
        DROP VIEW marts.patient_current
        """
    )
    assert view_tables.refresh_marts(conn) == {}
    assert list_marts(conn) == OF_PATIENT


def test_migrate_makes_a_mart_whose_name_has_become_free(
    conn: Session, database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    conn.execute("CREATE TABLE marts.patient_current (id text PRIMARY KEY)")
    conn.commit()
    monkeypatch.setenv("DB_URL", database)
    monkeypatch.setenv("FHIR_ASSETS_HOME", str(tmp_path))
    monkeypatch.setattr("fhir_assets.cli.migrate.build_views", lambda _: ViewSet((views()["patient"],), ()))
    monkeypatch.setattr("fhir_assets.orchestration.instance.config.ensure_dagster_database", lambda _: database)

    def migrate() -> str:
        return CliRunner().invoke(app, ["migrate"], catch_exceptions=False).output

    assert "marts.patient_current could not be created: a relation of this name exists" in migrate()
    conn.execute("ALTER TABLE marts.patient_current RENAME TO mine")
    conn.commit()
    assert "could not be created" not in migrate()
    assert list_marts(conn) == OF_PATIENT
