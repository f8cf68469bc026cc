"""The counts of the dashboard: right, without patients, and without small groups."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.record import Record
from fhir_assets.warehouse.postgres.db.connections import Session
from fhir_assets.warehouse.postgres.queries import dashboard
from fhir_assets.warehouse.postgres.tables.view_tables import ensure_tables
from fhir_assets_tests.support.shipped_views import views
from fhir_assets_tests.support.views import load

AMBULATORY = {"system": "http://terminology.hl7.org/CodeSystem/v3-ActCode", "code": "AMB"}
MOMENT = datetime(2024, 1, 1, tzinfo=UTC)
TABLES = ("patient", "condition", "encounter", "observation")


def record(resource_type: str, identity: str, **elements: Any) -> Record:
    meta = {"versionId": "1", "lastUpdated": MOMENT.isoformat()}
    body = json.dumps({"resourceType": resource_type, "id": identity, "meta": meta, **elements}).encode()
    return Record(resource_type, identity, "1", MOMENT, MOMENT, body)


def concept(code: str) -> dict[str, Any]:
    return {"coding": [{"system": "http://snomed.info/sct", "code": code, "display": f"Display of {code}"}]}


def subject(number: int) -> dict[str, str]:
    return {"reference": f"Patient/p{number}"}


@pytest.fixture
def loaded(conn: Session) -> Session:
    """Nine patients: seven have asthma, four another condition, five an encounter and a result."""
    main_views = {name: views()[name] for name in TABLES}
    ensure_tables(conn, main_views.values())
    patients = [
        record("Patient", f"p{n}", gender="male", **({"birthDate": "1900-01-01"} if n < 8 else {})) for n in range(8)
    ]
    patients.append(record("Patient", "dead", gender="male", birthDate="1900-01-01", deceasedBoolean=True))
    conditions = [record("Condition", f"a{n}", code=concept("195967001"), subject=subject(n)) for n in range(7)]
    conditions += [record("Condition", f"r{n}", code=concept("7"), subject=subject(min(n, 3))) for n in range(6)]
    encounters = [
        record("Encounter", f"e{n}", **{"class": AMBULATORY}, subject=subject(n), period={"start": "2020-02-29"})
        for n in range(5)
    ]
    laboratory = [{"coding": [{"code": "laboratory"}]}]
    results = [
        record(
            "Observation",
            f"o{n}",
            category=laboratory,
            code=concept("glucose"),
            subject=subject(n % 5),
            effectiveDateTime="2020-01-02",
            valueQuantity={"value": 1, "unit": "mg"},
        )
        for n in range(6)
    ]
    for view, records in zip(main_views.values(), (patients, conditions, encounters, results), strict=True):
        load(conn, *records, views=(view,))
    return conn


def read(conn: Session, panel: dashboard.Panel) -> list[tuple[Any, ...]]:
    answer = dashboard.read(conn, panel)
    assert answer is not None
    return list(answer.rows)


def test_the_counts_are_those_of_the_tables(loaded: Session) -> None:
    assert read(loaded, dashboard.POPULATION) == [("male", "90 and older", 8)]
    assert read(loaded, dashboard.CONDITIONS) == [("Display of 195967001", 7)]
    assert [(str(month), kind, count) for month, kind, count in read(loaded, dashboard.ENCOUNTERS)] == [
        ("2020-02", "ambulatory", 5)
    ]
    [(test, unit, results, patients, newest)] = read(loaded, dashboard.LABS)
    assert (test, unit, results, patients, str(newest)) == ("Display of glucose", "mg", 6, 5, "2020-01-02")
    completeness = {
        (row[0], row[2]): (row[1], *row[3:]) for panel in dashboard.COMPLETENESS for row in read(loaded, panel)
    }
    assert completeness["patient", "birth_date"] == (9, 9, "100%")
    assert completeness["patient", "race_code"] == (9, 0, "0%")
    assert completeness["observation", "loinc_code"] == (6, 0, "0%")
    answers = [dashboard.read(loaded, panel) for panel in dashboard.FRESHNESS]
    freshness = {row[0]: row[1:] for answer in answers if answer for row in answer.rows}
    assert {name: count for name, (count, _, _) in freshness.items()} == {
        "Condition": 13,
        "Encounter": 5,
        "Observation": 6,
        "Patient": 9,
    }
    assert [newest for _, newest, _ in freshness.values()] == [MOMENT] * 4
    assert None not in [loaded_at for _, _, loaded_at in freshness.values()]


def test_a_reader_may_read_all_panels(loaded: Session) -> None:
    loaded.execute("SET LOCAL ROLE fhir_reader")
    answers = {panel.name: dashboard.read(loaded, panel) for panel in dashboard.PANELS}
    assert answers["population"] is not None
    assert answers["freshness of patient"] is not None


def test_a_table_without_a_column_of_its_panel_is_no_error(loaded: Session) -> None:
    loaded.execute("ALTER TABLE fhir.observation DROP COLUMN last_updated CASCADE")
    answers = {panel.name: dashboard.read(loaded, panel) for panel in dashboard.FRESHNESS}
    assert answers["freshness of observation"] is None
    assert answers["freshness of patient"] is not None


def test_groups_of_few_patients_are_not_shown(loaded: Session) -> None:
    loaded.execute("UPDATE fhir.condition SET patient_key = 'p1' WHERE id <> 'a0'")
    loaded.execute("UPDATE fhir.encounter SET patient_key = NULL WHERE id = 'e0'")
    loaded.execute("UPDATE fhir.observation SET patient_key = 'p1'")
    loaded.execute("UPDATE fhir.patient SET gender = id")
    for panel in (dashboard.POPULATION, dashboard.CONDITIONS, dashboard.ENCOUNTERS, dashboard.LABS):
        assert read(loaded, panel) == [], panel.name


def test_a_login_that_may_not_read_the_tables_is_an_error_that_names_the_role(loaded: Session) -> None:
    loaded.execute("SET LOCAL ROLE fhir_operator")
    with pytest.raises(ConfigurationError, match=r"may not read fhir\.patient: grant it the role fhir_reader"):
        dashboard.read(loaded, dashboard.COMPLETENESS[0])


def test_a_panel_whose_type_was_never_loaded_has_no_answer(conn: Session) -> None:
    without = [panel.name for panel in dashboard.PANELS if dashboard.read(conn, panel) is None]
    assert without == [panel.name for panel in dashboard.PANELS]
