"""The views in ``sql/views``: complete, consistent with R4, and tagged where a column identifies a person."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from fhir_assets.catalog import BY_NAME, CATALOG
from fhir_assets.fhir.model import r4
from fhir_assets.fhir.path import CompiledPath, compile_path
from fhir_assets.fhir.views import Column, View, load_views
from fhir_assets_tests.support.saturated_resources import Resource
from fhir_assets_tests.support.shipped_views import VIEWS, build_rows, paths, saturated_for_views, views, views_of_type

RESERVED = frozenset(
    re.findall(
        r"\w+",
        """
        all analyse analyze and any array as asc asymmetric authorization binary both case cast
        check collate collation column concurrently constraint create cross current_catalog
        current_date current_role current_schema current_time current_timestamp current_user default
        deferrable desc distinct do else end except false fetch for foreign freeze from full grant
        group having ilike in initially inner intersect into is isnull join lateral leading left
        like limit localtime localtimestamp natural not notnull null offset on only or order outer
        overlaps placing primary references returning right select session_user similar some
        symmetric system_user table tablesample then to trailing true union unique user using
        variadic verbose when where window with
        """,
    )
)
"""The words that Postgres 18 accepts as a column name only in quotes."""

TAGS = {"index": {"btree"}, "phi": {"encrypt", "hash", "year", "drop", "none"}, "phi-index": {"hmac"}}

ALIKE = {"dateTime": {"date", "instant"}, "string": {"markdown", "code", "id"}}
"""Types whose values a column of another type also accepts, for elements with a choice of both."""

PERSONAL = re.compile(
    r"HumanName\.(text|family|given|prefix|suffix)|Address\.(text|line|city|district|postalCode)|ContactPoint\.value"
    r"|Identifier\.value|Reference\.display|Annotation\.text|Attachment\.(data|url|title)|Dosage\.(text|patientInstruction)"
)
"""Elements that identify a person or contain free text. A column with one of them must be tagged."""

UNSATURATED = ("extension(", "resolve()")
"""Functions whose result is empty for a saturated resource, which has neither extensions nor contained resources."""

WITHOUT_PERSONAL_DATA = {"Organization", "Location"}


def compiled(definition: Mapping[str, Any], root_type: str) -> Iterator[tuple[dict[str, Any], CompiledPath]]:
    """Yield each column except ``%rowIndex``, with its path compiled for the type that its rows iterate over."""
    iterated = definition.get("forEach") or definition.get("forEachOrNull") or definition.get("repeat", [None])[0]
    if iterated is not None:
        root_type = "|".join(compile_path(iterated, root_type=root_type).types or ())
    for column in definition.get("column", ()):
        if column["path"] != "%rowIndex":
            yield column, compile_path(column["path"], root_type=root_type)
    for part in definition.get("select", ()):
        yield from compiled(part, root_type)


def columns() -> list[tuple[View, Column]]:
    return [(view, column) for view in views().values() for column in view.columns]


# The catalog ------------------------------------------------------------------------------------------------------


def test_every_shipped_view_loads() -> None:
    loaded = load_views([VIEWS])
    assert loaded.broken == ()
    assert len(loaded.views) == len(list(VIEWS.glob("*.json")))


@pytest.mark.parametrize("resource_type", [resource_type.name for resource_type in CATALOG])
def test_a_type_has_a_main_view_and_its_child_views_start_with_its_name(resource_type: str) -> None:
    key = BY_NAME[resource_type].key
    names = [view.name for view in views_of_type(resource_type)]
    assert key in names
    assert [name for name in names if name != key and not name.startswith(f"{key}_")] == []


def test_a_view_has_the_name_of_its_file_and_a_title() -> None:
    for view in views().values():
        assert view.path is not None
        assert view.path.stem == view.name
        assert view.url == f"https://fhir-assets.dev/ViewDefinition/{view.name}"
        assert view.resource_type in BY_NAME
        assert view.title
        assert view.description


def test_the_first_column_is_the_id_in_a_main_view_and_the_key_of_the_parent_in_a_child_view() -> None:
    for view in views().values():
        parent = BY_NAME[view.resource_type].key
        name, path = next(paths(view.definition))
        assert path == "getResourceKey()"
        assert name == ("id" if view.name == parent else f"{parent}_key")


# The columns ------------------------------------------------------------------------------------------------------


def test_a_column_name_needs_no_quotes_and_does_not_collide_with_columns_of_the_loader() -> None:
    for view, column in columns():
        assert re.fullmatch(r"[a-z][a-z0-9_]{0,52}", column.name), f"{view.name}.{column.name}"
        assert column.name not in RESERVED, f"{view.name}.{column.name}"
        assert not column.name.endswith("_precision"), f"{view.name}.{column.name}"


def test_a_column_has_a_type_a_description_and_a_unique_name() -> None:
    for view, column in columns():
        assert r4().is_primitive(column.type), f"{view.name}.{column.name}"
        assert column.description, f"{view.name}.{column.name}"
        assert not column.collection, f"{view.name}.{column.name}"
    for view in views().values():
        assert [name for name, n in Counter(column.name for column in view.columns).items() if n > 1] == []


def test_a_path_compiles_to_a_single_value_of_the_type_that_the_column_declares() -> None:
    for view in views().values():
        for column, path in compiled(view.definition, view.resource_type):
            name = f"{view.name}.{column['name']}"
            assert not path.fallback, name
            assert not path.many, name
            assert path.types is not None, name
            assert column["type"] in path.types, name
            assert path.types <= {column["type"]} | ALIKE.get(column["type"], set()), name


def test_tags_are_of_the_known_kinds() -> None:
    for view, column in columns():
        for name, value in column.tags.items():
            assert value in TAGS.get(name, set()), f"{view.name}.{column.name}: {name}={value}"
        assert column.tags.get("phi-index") is None or column.tags["phi"] == "encrypt", f"{view.name}.{column.name}"


NAMED_CODE = re.compile(r"(^|_)(loinc|snomed|rxnorm|icd10|ndc|cvx|cpt)_code")


def test_join_keys_and_codes_of_named_systems_are_indexed() -> None:
    for view in views().values():
        keys = {name for name, path in paths(view.definition) if "getReferenceKey(" in path}
        wanted = {view.columns[0].name} | keys | {c.name for c in view.columns if NAMED_CODE.fullmatch(c.name)}
        assert wanted <= {column.name for column in view.columns if "index" in column.tags}, view.name


# Rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resource_type", [resource_type.name for resource_type in CATALOG])
def test_a_saturated_resource_fills_every_column_with_a_single_value(resource_type: str) -> None:
    filled: dict[str, set[str]] = defaultdict(set)
    for resource in saturated_for_views(resource_type):
        rows_by_view = build_rows(resource)
        assert len(rows_by_view[BY_NAME[resource_type].key]) == 1
        for name, view_rows in rows_by_view.items():
            filled[name] |= {column for row in view_rows for column, value in row.items() if value not in (None, "")}
    empty = {
        f"{view.name}.{name}"
        for view in views_of_type(resource_type)
        for name, path in paths(view.definition)
        if name not in filled[view.name]
        and not any(call in f"{path} {view.definition['select'][-1].get('forEach')}" for call in UNSATURATED)
    }
    assert empty == set()


@pytest.mark.parametrize(
    "resource_type",
    sorted({resource_type.name for resource_type in CATALOG} - WITHOUT_PERSONAL_DATA),
)
def test_a_column_that_identifies_a_person_is_tagged(resource_type: str) -> None:
    untagged = {
        f"{view.name}.{column.name}"
        for resource in saturated_for_views(resource_type)
        for name, view_rows in build_rows(resource).items()
        for view in [views()[name]]
        for row in view_rows
        for column in view.columns
        if PERSONAL.search(str(row[column.name])) and "phi" not in column.tags
    }
    assert untagged == set()


def test_a_birth_date_is_tagged_to_be_reduced_to_its_year() -> None:
    for view, column in columns():
        if "birth_date" in column.name:
            assert column.tags["phi"] == "year", f"{view.name}.{column.name}"


def test_an_empty_resource_gives_one_row_of_nulls() -> None:
    for resource_type in CATALOG:
        rows_by_view = build_rows({"resourceType": resource_type.name, "id": "a"})
        main = rows_by_view.pop(resource_type.key)
        assert [{name for name, value in row.items() if value is not None} for row in main] == [{"id"}]
        assert {name: view_rows for name, view_rows in rows_by_view.items() if view_rows} == {}


def test_a_patient_becomes_the_row_that_an_analyst_expects() -> None:
    us_core = "http://hl7.org/fhir/us/core/StructureDefinition/us-core-"
    identifier_type = "http://terminology.hl7.org/CodeSystem/v2-0203"
    rows_by_view = build_rows(
        {
            "resourceType": "Patient",
            "id": "p1",
            "meta": {"versionId": "3", "lastUpdated": "2024-01-03T04:25:20.301Z"},
            "extension": [
                {
                    "url": f"{us_core}race",
                    "extension": [
                        {"url": "ombCategory", "valueCoding": {"code": "2106-3", "display": "White"}},
                        {"url": "ombCategory", "valueCoding": {"code": "2028-9", "display": "Asian"}},
                        {"url": "text", "valueString": "Mixed"},
                    ],
                },
                {
                    "url": f"{us_core}ethnicity",
                    "extension": [
                        {"url": "ombCategory", "valueCoding": {"code": "2186-5", "display": "Not Hispanic"}},
                        {"url": "text", "valueString": "Not Hispanic"},
                    ],
                },
                {"url": f"{us_core}birthsex", "valueCode": "F"},
            ],
            "identifier": [
                {"system": "http://hl7.org/fhir/sid/us-ssn", "value": "999-12-3456"},
                {"type": {"coding": [{"system": identifier_type, "code": "MR"}]}, "system": "urn:a", "value": "0042"},
            ],
            "name": [
                {"use": "maiden", "family": "Before"},
                {"use": "official", "family": "After", "given": ["Ann", "B."]},
            ],
            "telecom": [{"system": "email", "value": "a@example.org"}, {"system": "phone", "value": "555-0100"}],
            "birthDate": "1970-05",
            "deceasedDateTime": "2020",
            "address": [{"line": ["1 Street", "Flat 2"], "city": "Town", "state": "MA"}, {"city": "Elsewhere"}],
            "generalPractitioner": [{"reference": "Organization/o1"}, {"reference": "Practitioner/d1"}],
            "managingOrganization": {"reference": "https://example.org/fhir/Organization/o1/_history/2"},
        }
    )
    patient = rows_by_view["patient"][0]
    assert {name: value for name, value in patient.items() if value is not None} == {
        "id": "p1",
        "version_id": "3",
        "last_updated": "2024-01-03T04:25:20.301Z",
        "family": "After",
        "given": "Ann B.",
        "family_search": "after",
        "given_search": "ann",
        "birth_date": "1970-05",
        "deceased_date_time": "2020",
        "mrn": "0042",
        "ssn": "999-12-3456",
        "phone": "555-0100",
        "email": "a@example.org",
        "address_line": "1 Street, Flat 2",
        "address_city": "Town",
        "address_state": "MA",
        "race_code": "2106-3",
        "race_display": "White",
        "race_text": "Mixed",
        "ethnicity_code": "2186-5",
        "ethnicity_display": "Not Hispanic",
        "ethnicity_text": "Not Hispanic",
        "birth_sex": "F",
        "general_practitioner_key": "d1",
        "managing_organization_key": "o1",
    }
    assert [(row["patient_key"], row["index"], row["family"]) for row in rows_by_view["patient_name"]] == [
        ("p1", 0, "Before"),
        ("p1", 1, "After"),
    ]
    assert [
        (row["index"], row["organization_key"], row["practitioner_key"])
        for row in rows_by_view["patient_general_practitioner"]
    ] == [
        (0, "o1", None),
        (1, None, "d1"),
    ]


def test_an_instant_and_a_period_both_have_a_start() -> None:
    def start(**effective: object) -> tuple[object, object]:
        row = build_rows({"resourceType": "Observation", "id": "o", **effective})["observation"][0]
        return row["effective_start"], row["effective_end"]

    assert start(effectiveDateTime="2020-01") == ("2020-01", None)
    assert start(effectiveInstant="2020-01-01T00:00:00Z") == ("2020-01-01T00:00:00Z", None)
    assert start(effectivePeriod={"start": "2020", "end": "2021"}) == ("2020", "2021")
    assert start(effectivePeriod={"end": "2021"}) == (None, "2021")


def test_a_code_of_a_standard_is_found_at_any_position_among_the_codings() -> None:
    codings = [
        {"system": "urn:local", "code": "BP", "display": "Blood pressure"},
        {"system": "http://loinc.org", "code": "85354-9"},
    ]
    row = build_rows({"resourceType": "Observation", "id": "o", "code": {"coding": codings}})["observation"][0]
    assert (row["code_system"], row["code"], row["code_display"]) == ("urn:local", "BP", "Blood pressure")
    assert (row["loinc_code"], row["snomed_code"]) == ("85354-9", None)


def test_consent_provisions_of_every_depth_become_rows_with_their_actors() -> None:
    def actor(code: str) -> Resource:
        return {"role": {"coding": [{"code": code}]}, "reference": {"reference": f"Organization/{code}"}}

    exception = {"type": "permit", "actor": [actor("b")]}
    rule = {"type": "deny", "actor": [actor("a")], "provision": [{"type": "permit", "provision": [exception]}]}
    rows_by_view = build_rows({"resourceType": "Consent", "id": "c", "provision": rule})
    assert [(row["index"], row["type"]) for row in rows_by_view["consent_provision"]] == [
        (0, "deny"),
        (1, "permit"),
        (2, "permit"),
    ]
    assert [
        (row["provision_index"], row["index"], row["organization_key"])
        for row in rows_by_view["consent_provision_actor"]
    ] == [
        (0, 0, "a"),
        (2, 0, "b"),
    ]
