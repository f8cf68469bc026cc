"""The SQL of the dbt models, on Postgres and DuckDB, with and without encrypted columns.

`make dbt-story` runs the models with dbt itself.
"""

from datetime import date, datetime
from typing import Any

import pytest

from fhir_assets.warehouse.dbt.package import find_package_folder
from fhir_assets.warehouse.dbt.targets import TARGETS, read_target
from fhir_assets_tests.support.dbt_tables import Execute, connect_to, create_models, insert, insert_claim
from fhir_assets_tests.support.dbt_tables import execute as execute
from fhir_assets_tests.support.dbt_tables import models as models

LOCAL = "http://hospital.test/diagnoses"
ICD = "http://hl7.org/fhir/sid/icd-10-cm"
LOINC = "http://loinc.org"
SNOMED = "http://snomed.info/sct"
UCUM = "http://unitsofmeasure.org"
NPI = "http://hl7.org/fhir/sid/us-npi"
TYPE_NAMES = {"varchar": "text", "decimal": "numeric", "timestamp without time zone": "timestamp"}
"""The names of types in the targets, by those of the databases where they differ."""


@pytest.mark.parametrize("engine", ["postgres", "duckdb"])
def test_encrypted_coordinates_are_null_and_no_model_needs_an_encrypted_column_as_a_number_or_date(
    engine: str, postgres: str
) -> None:
    with connect_to(engine, postgres) as execute:
        create_models(execute, engine, encrypted=True)
        insert(execute, "stg_patient", id="a", address_city="gAAAAAcity")
        insert(execute, "stg_patient_address", patient_key="a", index=0, latitude="gAAAAA1", longitude="gAAAAA2")
        insert(execute, "stg_location", id="l", latitude="47.5", longitude="-8.25")
        locations = execute("SELECT city, latitude, longitude FROM omop__location ORDER BY location_source_value")
        assert [tuple(map(as_number, row)) for row in locations] == [(None, 47.5, -8.25), ("gAAAAAcity", None, None)]
        assert execute("SELECT latitude, longitude FROM tuva__patient") == [(None, None)]


def test_coordinates_keep_their_digits(execute: Execute) -> None:
    insert(execute, "stg_patient", id="a", address_city="Basel")
    insert(execute, "stg_patient_address", patient_key="a", index=0, latitude="47.123456789", longitude="-7")
    for model in ("omop__location", "tuva__patient"):
        ((latitude, longitude),) = execute(f"SELECT latitude, longitude FROM {model}")
        assert (as_number(latitude), as_number(longitude)) == (47.123456789, -7), model


def as_number(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else float(value)


def test_resources_of_two_sources_with_the_same_id_have_different_keys_in_tuva(execute: Execute) -> None:
    for source in ("default", "north"):
        keys = {"_source": source, "id": "1", "patient_key": "1", "encounter_key": "1", "practitioner_key": "1"}
        insert(execute, "stg_patient", _source=source, id="1")
        insert(execute, "stg_encounter", _source=source, id="1", patient_key="1", practitioner_key="1")
        insert(execute, "stg_condition", _source=source, id="1", patient_key="1", encounter_key="1")
        insert(execute, "stg_procedure", **keys)
        insert(execute, "stg_medication_dispense", **keys)
        insert(execute, "stg_observation", **keys, code="8867-4")
        insert(execute, "stg_observation", **{**keys, "id": "2"}, code="718-7")
        insert(execute, "stg_observation_category", _source=source, observation_key="2", category_code="laboratory")
        insert(execute, "stg_coverage", _source=source, id="1", patient_key="1", subscriber_key="1")
        insert(execute, "stg_explanation_of_benefit", _source=source, id="1", patient_key="1")
        insert(execute, "stg_explanation_of_benefit_item", _source=source, explanation_of_benefit_key="1", index="0")
        insert(execute, "stg_explanation_of_benefit", _source=source, id="2", patient_key="1", type_code="pharmacy")
        insert(execute, "stg_explanation_of_benefit_item", _source=source, explanation_of_benefit_key="2", index="0")
        insert(execute, "stg_immunization", **keys, location_key="1")
        insert(execute, "stg_location", _source=source, id="1")
        insert(execute, "stg_practitioner", _source=source, id="1")
    for table, key in (
        ("patient", "person_id"),
        ("encounter", "encounter_id"),
        ("condition", "source_condition_id"),
        ("procedure", "source_procedure_id"),
        ("observation", "observation_id"),
        ("lab_result", "lab_result_id"),
        ("medication", "medication_id"),
        ("immunization", "immunization_id"),
        ("medical_claim", "claim_id"),
        ("pharmacy_claim", "claim_id"),
        ("eligibility", "subscriber_id"),
    ):
        rows = execute(f"SELECT person_id, {key} FROM tuva__{table} ORDER BY data_source")
        assert [row[0] for row in rows] == ["1", "north/1"], table
        assert rows[1][1] == f"north/{rows[0][1]}", table
    for table in ("condition", "procedure", "observation", "lab_result", "medication", "immunization"):
        rows = execute(f"SELECT encounter_id FROM tuva__{table} ORDER BY data_source")
        assert rows == [("1",), ("north/1",)], table
    for table, key in (
        ("encounter", "attending_provider_id"),
        ("immunization", "location_id"),
        ("immunization", "practitioner_id"),
        ("location", "location_id"),
        ("practitioner", "practitioner_id"),
    ):
        rows = execute(f"SELECT {key} FROM tuva__{table} ORDER BY data_source")
        assert rows == [("1",), ("north/1",)], (table, key)


def test_the_primary_diagnosis_has_the_type_of_its_own_code(execute: Execute) -> None:
    reason = {"reason_system": ICD, "reason_code": "R07.4", "reason_display": "Chest pain"}
    for encounter in ("coded", "refuted", "wrong", "text", "local"):
        insert(execute, "stg_encounter", id=encounter, **(reason if encounter != "local" else {}))
    insert(execute, "stg_encounter", id="reason", reason_system=LOCAL, reason_code="B2")
    conditions: dict[str, dict[str, str]] = {
        "coded": {"code_system": LOCAL, "code": "A1"},
        "refuted": {"code_system": LOCAL, "code": "A2", "verification_status": "refuted"},
        "wrong": {"code_system": LOCAL, "code": "A3", "verification_status": "entered-in-error"},
        "text": {"code_text": "pain"},
        "local": {"code": "A4"},
    }
    for name, columns in conditions.items():
        insert(execute, "stg_condition", id=name, **columns)
        insert(execute, "stg_encounter_diagnosis", encounter_key=name, condition_key=name, index="0")
    query = "SELECT encounter_id, primary_diagnosis_code_type, primary_diagnosis_code FROM tuva__encounter ORDER BY 1"
    assert execute(query) == [
        ("coded", LOCAL, "A1"),
        ("local", None, "A4"),
        ("reason", LOCAL, "B2"),
        ("refuted", "icd-10-cm", "R07.4"),
        ("text", "icd-10-cm", "R07.4"),
        ("wrong", "icd-10-cm", "R07.4"),
    ]


def test_the_order_of_a_result_has_the_type_and_text_of_its_own_code(execute: Execute) -> None:
    insert(execute, "stg_service_request", id="order", code="CBC-1")
    for panel in ("ordered", "alone"):
        order = {"service_request_key": "order"} if panel == "ordered" else {}
        text = {"code_system": LOINC, "code": "58410-2", "code_display": "Complete blood count"}
        insert(execute, "stg_observation", id=panel, **text, **order)
        insert(execute, "stg_observation_component", observation_key=panel, index="0", code="718-7", value_integer="1")
        insert(execute, "stg_observation_category", observation_key=panel, category_code="laboratory")
    query = (
        "SELECT lab_result_id, source_order_type, source_order_code, source_order_description"
        " FROM tuva__lab_result ORDER BY 1"
    )
    assert execute(query) == [
        ("alone#0", "loinc", "58410-2", "Complete blood count"),
        ("ordered#0", None, "CBC-1", None),
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_the_columns_of_the_models_have_the_types_of_their_target(execute: Execute, target: str) -> None:
    rows = execute("SELECT table_name, column_name, data_type FROM information_schema.columns")
    found = {(table, column): kind.partition("(")[0].lower() for table, column, kind in rows}
    for table, columns in read_target(find_package_folder(), target).items():
        kinds = {column.name: found[f"{target}__{table}", column.name] for column in columns}
        types = {name: TYPE_NAMES.get(kind, kind) for name, kind in kinds.items()}
        assert types == {column.name: column.type for column in columns}, table


def test_patients_and_members_have_their_suffix_ethnicity_and_email(execute: Execute) -> None:
    person = {"suffix": "Jr.", "ethnicity_code": "2186-5", "email": "a@b.test"}
    insert(execute, "stg_patient", id="a", **person)
    insert(execute, "stg_coverage", id="c", patient_key="a")
    for table in ("patient", "eligibility"):
        rows = execute(f"SELECT name_suffix, ethnicity, email FROM tuva__{table}")
        assert rows == [("Jr.", "2186-5", "a@b.test")], table


def test_the_facility_of_an_encounter_has_the_npi_of_its_service_provider(execute: Execute) -> None:
    insert(execute, "stg_organization", id="o", name="Hospital", npi="1234567893")
    insert(execute, "stg_encounter", id="e", service_provider_key="o")
    assert execute("SELECT facility_npi, facility_name FROM tuva__encounter") == [("1234567893", "Hospital")]


def test_a_unit_is_normalized_if_its_code_is_of_ucum(execute: Execute) -> None:
    for key, system in (("a", UCUM), ("b", LOCAL)):
        for table in ("observation", "lab_result"):
            unit = {"value_quantity_value": "1", "value_quantity_unit": "gram", "value_quantity_code": "g"}
            insert(execute, "stg_observation", id=f"{table}-{key}", value_quantity_system=system, **unit)
        insert(execute, "stg_observation_category", observation_key=f"lab_result-{key}", category_code="laboratory")
    for table in ("observation", "lab_result"):
        rows = execute(f"SELECT source_units, normalized_units FROM tuva__{table} ORDER BY {table}_id")
        assert rows == [("gram", "g"), ("gram", None)], table


def test_a_condition_without_a_code_system_has_an_unknown_one(execute: Execute) -> None:
    for key, system in (("a", {"code_system": ICD}), ("b", {"code_system": LOCAL}), ("c", {})):
        insert(execute, "stg_condition", id=key, code="R07.4", **system)
    assert execute("SELECT source_condition_id, code_system FROM tuva__condition ORDER BY 1") == [
        ("a", "icd-10-cm"),
        ("b", LOCAL),
        ("c", "unknown"),
    ]


def test_an_immunization_has_its_cvx_code_and_dose_and_one_that_was_not_done_its_reason(execute: Execute) -> None:
    given = {
        "vaccine_system": LOCAL,
        "vaccine_code": "FLU",
        "vaccine_display": "Influenza vaccine",
        "cvx_code": "140",
        "occurrence_date_time_date": "2024-10-01",
        "dose_quantity_value": "0.50",
        "dose_quantity_unit": "mL",
        "site_code": "LA",
        "route_text": "into the muscle",
    }
    refused = {"vaccine_system": LOCAL, "vaccine_code": "FLU", "status_reason_code": "IMMUNE"}
    insert(execute, "stg_immunization", id="a", status="completed", **given)
    insert(execute, "stg_immunization", id="b", status="not-done", recorded_date="2024-10-02", **refused)
    insert(execute, "stg_immunization", id="c", status="entered-in-error", **given)
    assert execute(
        "SELECT immunization_id, source_code_type, source_code, source_description, status, status_reason,"
        " occurrence_date, source_dose, body_site, route FROM tuva__immunization ORDER BY 1"
    ) == [
        (
            *("a", "cvx", "140", "Influenza vaccine", "completed", None),
            *(date(2024, 10, 1), "0.5 mL", "LA", "into the muscle"),
        ),
        ("b", LOCAL, "FLU", None, "not-done", "IMMUNE", date(2024, 10, 2), None, None, None),
    ]


def test_the_strength_of_a_medication_has_no_zeros_at_its_end(execute: Execute) -> None:
    insert(execute, "stg_medication", id="m", amount_numerator_value="500.0", amount_numerator_unit="mg")
    insert(execute, "stg_medication_request", id="r", medication_key="m")
    assert execute("SELECT strength FROM tuva__medication") == [("500 mg",)]


def test_a_location_has_its_npi_or_that_of_its_organization_and_so_has_the_facility_of_a_claim(
    execute: Execute,
) -> None:
    insert(execute, "stg_organization", id="o", name="Hospital", npi="1234567893")
    insert(execute, "stg_location", id="ward", managing_organization_key="o", type_display="Ward", latitude="47.5")
    insert(execute, "stg_location", id="room", part_of_key="site", physical_type_code="ro", address_city="Basel")
    insert(execute, "stg_location", id="site", name="Site")
    insert(execute, "stg_location_identifier", location_key="site", index="0", system=LOCAL, value="1")
    insert(execute, "stg_location_identifier", location_key="site", index="1", system=NPI, value="1000000004")
    query = "SELECT location_id, npi, facility_type, parent_organization, city, latitude FROM tuva__location ORDER BY 1"
    assert [tuple(map(as_number, row[-1:])) + row[:-1] for row in execute(query)] == [
        (None, "room", None, "ro", "Site", "Basel"),
        (None, "site", "1000000004", None, None, None),
        (47.5, "ward", "1234567893", "Ward", "Hospital", None),
    ]
    insert_claim(execute, "claim", {}, facility_key="ward")
    assert execute("SELECT facility_npi FROM tuva__medical_claim") == [("1234567893",)]


def test_a_practitioner_has_the_organization_and_specialty_of_the_role_that_began_last(execute: Execute) -> None:
    insert(execute, "stg_practitioner", id="p", npi="1234567893", given="Ann", family="Lee")
    for key, start, specialty in (("r1", "2020-01-01", "Surgery"), ("r2", "2024-01-01", "Cardiology")):
        organization = {"organization_key": f"{key}-org", "specialty_display": specialty, "specialty_code": key}
        insert(execute, "stg_practitioner_role", id=key, practitioner_key="p", period_start=start, **organization)
        insert(execute, "stg_organization", id=f"{key}-org", name=f"Clinic {key}")
    columns = "practitioner_id, npi, first_name, last_name, practice_affiliation, specialty"
    assert execute(f"SELECT {columns} FROM tuva__practitioner") == [
        ("p", "1234567893", "Ann", "Lee", "Clinic r2", "Cardiology")
    ]
    assert execute("SELECT specialty_source_value FROM omop__provider") == [("r2",)]


def test_a_specimen_of_a_patient_has_its_material_quantity_and_site(execute: Execute) -> None:
    material = {"type_system": LOCAL, "type_code": "BLD", "type_snomed_code": "122555007"}
    collected = {
        "collected_start": "2024-01-01 08:30:00+00",
        "collected_start_date": "2024-01-01",
        "collected_start_offset": "+01:00",
        "quantity_value": "4",
        "quantity_unit": "mL",
        "body_site_system": SNOMED,
        "body_site_code": "368208006",
    }
    insert(execute, "stg_specimen", id="a", patient_key="p", **material, **collected)
    insert(execute, "stg_specimen", id="b", patient_key="p", type_text="swab", received_time_date="2024-01-02")
    insert(execute, "stg_specimen", id="water", type_text="tap water")
    insert(execute, "stg_specimen", id="wrong", patient_key="p", status="entered-in-error")
    assert execute(
        "SELECT specimen_source_id, specimen_source_value, specimen_date, specimen_datetime, quantity,"
        " unit_concept_id, unit_source_value, anatomic_site_concept_id, anatomic_site_source_value"
        " FROM omop__specimen ORDER BY 1"
    ) == [
        ("a", "122555007", date(2024, 1, 1), datetime(2024, 1, 1, 9, 30), 4, 0, "mL", 0, "368208006"),
        ("b", "swab", date(2024, 1, 2), datetime(2024, 1, 2), None, None, None, None, None),
    ]
