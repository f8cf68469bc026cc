"""The SQL of the dbt models, on Postgres and DuckDB, with and without encrypted columns.

`make dbt-story` runs the models with dbt itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import duckdb
import psycopg
import pytest

from fhir_assets.warehouse.dbt.package import build_package, find_package_folder
from fhir_assets.warehouse.dbt.targets import TARGETS, read_target
from fhir_assets_tests.support.databases import fresh_database
from fhir_assets_tests.support.dbt_models import build_staging_tables, render_models
from fhir_assets_tests.support.shipped_views import views

Execute = Callable[[str], list[tuple[Any, ...]]]
LOCAL = "http://hospital.test/diagnoses"
ICD = "http://hl7.org/fhir/sid/icd-10-cm"
LOINC = "http://loinc.org"
TYPE_NAMES = {"varchar": "text", "decimal": "numeric", "timestamp without time zone": "timestamp"}
"""The names of types in the targets, by those of the databases where they differ."""


@contextmanager
def connect_to(engine: str, postgres: str) -> Iterator[Execute]:
    if engine == "duckdb":
        with duckdb.connect() as lake:
            yield lambda statement: lake.execute(statement).fetchall()
        return
    with fresh_database(postgres, "template0") as url, psycopg.connect(url, autocommit=True) as tables:

        def run(statement: str) -> list[tuple[Any, ...]]:
            cursor = tables.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

        yield run


def create_models(execute: Execute, engine: str, *, encrypted: bool) -> None:
    """Create empty tables for the staging models, and the other models as views of them."""
    files = build_package(list(views().values()), lake_url=None, encrypted=encrypted)
    execute(build_staging_tables(files, views(), engine, encrypted=encrypted))
    for name, select in render_models(files, engine):
        execute(f"CREATE VIEW {name} AS {select}")


@pytest.fixture(scope="module", params=["postgres", "duckdb"])
def models(request: pytest.FixtureRequest, postgres: str) -> Iterator[Execute]:
    """The models over empty tables without encryption, for all tests of an engine."""
    with connect_to(request.param, postgres) as execute:
        create_models(execute, request.param, encrypted=False)
        yield execute


@pytest.fixture
def execute(models: Execute) -> Iterator[Execute]:
    """The models over tables whose rows are gone after the test."""
    models("BEGIN")
    yield models
    models("ROLLBACK")


def insert(execute: Execute, table: str, **values: object) -> None:
    row = {"_source": "default", "loaded_at": "2024-01-01 00:00:00+00", **values}
    columns = ", ".join(f'"{column}"' for column in row)
    literals = ", ".join(f"'{value}'" for value in row.values())
    execute(f"INSERT INTO {table} ({columns}) VALUES ({literals})")


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
    for table, key in (
        ("patient", "person_id"),
        ("encounter", "encounter_id"),
        ("condition", "source_condition_id"),
        ("procedure", "source_procedure_id"),
        ("observation", "observation_id"),
        ("lab_result", "lab_result_id"),
        ("medication", "medication_id"),
        ("medical_claim", "claim_id"),
        ("eligibility", "subscriber_id"),
    ):
        rows = execute(f"SELECT person_id, {key} FROM tuva__{table} ORDER BY data_source")
        assert [row[0] for row in rows] == ["1", "north/1"], table
        assert rows[1][1] == f"north/{rows[0][1]}", table
    for table in ("condition", "procedure", "observation", "lab_result", "medication"):
        rows = execute(f"SELECT encounter_id FROM tuva__{table} ORDER BY data_source")
        assert rows == [("1",), ("north/1",)], table
    rows = execute("SELECT attending_provider_id FROM tuva__encounter ORDER BY data_source")
    assert rows == [("1",), ("north/1",)]


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
    for key, system in (("a", "http://unitsofmeasure.org"), ("b", LOCAL)):
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
