"""The views in ``sql/views``: complete, well named, true to R4, and marked where they tell who somebody is."""

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fhir_assets.catalog import BY_NAME, CATALOG
from fhir_assets.fhir.model import r4
from fhir_assets.fhir.path import CompiledPath, compile_path
from fhir_assets.fhir.views import Column, CompiledViews, View, load_views
from fhir_assets.sandbox.population import generate
from fhir_assets_tests.support.saturated_resources import Resource, saturated, saturated_resources

ROOT = Path(__file__).resolve().parents[2]
VIEWS = ROOT / "sql" / "views"
SHARED = ROOT.parent / "shared" / "data"

Row = dict[str, object]

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
"""The words that Postgres 18 takes as a column's name only in quotes."""

TAGS = {"index": {"btree"}, "phi": {"encrypt", "hash", "year", "drop", "none"}, "phi-index": {"hmac"}}

ALIKE = {"dateTime": {"date", "instant"}, "string": {"markdown", "code", "id"}}
"""What a column of a type holds as well, where an element may have either."""

PERSONAL = re.compile(
    r"HumanName\.(text|family|given|prefix|suffix)|Address\.(text|line|city|district|postalCode)|ContactPoint\.value"
    r"|Identifier\.value|Reference\.display|Annotation\.text|Attachment\.(data|url|title)|Dosage\.(text|patientInstruction)"
)
"""What says who somebody is, or is written freely; tagged wherever a view shows it."""

OF_NO_PERSON = {"Organization", "Location"}


@cache
def views() -> dict[str, View]:
    return {view.name: view for view in load_views([VIEWS]).views}


def of_type(resource_type: str) -> list[View]:
    return [view for view in views().values() if view.resource_type == resource_type]


@cache
def type_views(resource_type: str) -> CompiledViews:
    return CompiledViews(of_type(resource_type), empty_join=False)


def rows(resource: Resource) -> dict[str, list[Row]]:
    """The rows of each view of the resource's type, by column."""
    its = type_views(resource["resourceType"])
    return {
        view.name: [dict(zip((column.name for column in view.columns), row, strict=True)) for row in rows_of_view]
        for view, rows_of_view in zip(its.views, its.rows(resource), strict=True)
    }


def paths(definition: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The name and path of each column, however deep."""
    for column in definition.get("column", ()):
        yield column["name"], column["path"]
    for each in definition.get("select", ()):
        yield from paths(each)


def expressions(definition: Mapping[str, Any]) -> Iterator[str]:
    """Every FHIRPath expression: of the columns, and of what one row is made for."""
    yield from (path for _, path in paths(definition))
    for each in definition["select"]:
        yield from (each[key] for key in ("forEach", "forEachOrNull") if key in each)


def compiled(definition: Mapping[str, Any], root_type: str) -> Iterator[tuple[dict[str, Any], CompiledPath]]:
    """Each column but ``%rowIndex``, with its path compiled for the type of what its rows are made for."""
    each = definition.get("forEach") or definition.get("forEachOrNull") or definition.get("repeat", [None])[0]
    if each is not None:
        root_type = "|".join(compile_path(each, root_type=root_type).types or ())
    for column in definition.get("column", ()):
        if column["path"] != "%rowIndex":
            yield column, compile_path(column["path"], root_type=root_type)
    for part in definition.get("select", ()):
        yield from compiled(part, root_type)


def columns() -> list[tuple[View, Column]]:
    return [(view, column) for view in views().values() for column in view.columns]


def saturated_for_views(resource_type: str) -> Iterator[Resource]:
    """Saturated resources, and one for each set of literals on which a view of the type looks."""
    yield from saturated_resources(resource_type)
    looked_at = {
        tuple(re.findall(r"(\w+) = '([^']*)'", path))
        for view in of_type(resource_type)
        for path in expressions(view.definition)
    }
    for literals in sorted(looked_at):
        made = saturated(resource_type, 0, {"focal": True, **dict(literals)})
        yield {**made, "resourceType": resource_type, "id": "a"}


# The catalogue ----------------------------------------------------------------------------------------------------


def test_every_shipped_view_loads() -> None:
    loaded = load_views([VIEWS])
    assert loaded.broken == ()
    assert len(loaded.views) == len(list(VIEWS.glob("*.json")))


@pytest.mark.parametrize("resource_type", [each.name for each in CATALOG])
def test_a_type_has_its_main_view_and_its_child_views_bear_its_name(resource_type: str) -> None:
    key = BY_NAME[resource_type].key
    names = [view.name for view in of_type(resource_type)]
    assert key in names
    assert [name for name in names if name != key and not name.startswith(f"{key}_")] == []


def test_a_view_is_named_as_its_file_and_titled() -> None:
    for view in views().values():
        assert view.path is not None
        assert view.path.stem == view.name
        assert view.url == f"https://fhir-assets.dev/ViewDefinition/{view.name}"
        assert view.resource_type in BY_NAME
        assert view.title
        assert view.description


def test_a_main_view_begins_with_its_id_and_a_child_view_with_the_key_of_its_parent() -> None:
    for view in views().values():
        parent = BY_NAME[view.resource_type].key
        name, path = next(paths(view.definition))
        assert path == "getResourceKey()"
        assert name == ("id" if view.name == parent else f"{parent}_key")


# The columns ------------------------------------------------------------------------------------------------------


def test_a_columns_name_needs_no_quotes_and_does_not_clash_with_the_loaders() -> None:
    for view, column in columns():
        assert re.fullmatch(r"[a-z][a-z0-9_]{0,52}", column.name), f"{view.name}.{column.name}"
        assert column.name not in RESERVED, f"{view.name}.{column.name}"
        assert not column.name.endswith("_precision"), f"{view.name}.{column.name}"


def test_a_column_is_typed_described_and_named_once() -> None:
    for view, column in columns():
        assert r4().is_primitive(column.type), f"{view.name}.{column.name}"
        assert column.description, f"{view.name}.{column.name}"
        assert not column.collection, f"{view.name}.{column.name}"
    for view in views().values():
        assert [name for name, n in Counter(column.name for column in view.columns).items() if n > 1] == []


def test_a_path_is_compiled_gives_one_value_and_the_type_that_the_column_declares() -> None:
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


def test_keys_that_join_are_indexed_and_no_table_has_too_many_indexes() -> None:
    for view in views().values():
        indexed = {column.name for column in view.columns if "index" in column.tags}
        keys = {view.columns[0].name}
        if view.name == BY_NAME[view.resource_type].key:
            keys |= {column.name for column in view.columns} & {"patient_key", "encounter_key"}
        assert keys <= indexed, view.name
        # Patients are looked up by each of their names, also in small letters.
        assert len(indexed) <= (7 if view.name == "patient" else 5), view.name


# What they give ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resource_type", [each.name for each in CATALOG])
def test_a_resource_that_says_everything_twice_gives_one_value_a_column_and_fills_them_all(resource_type: str) -> None:
    filled: dict[str, set[str]] = defaultdict(set)
    for resource in saturated_for_views(resource_type):
        made = rows(resource)
        assert len(made[BY_NAME[resource_type].key]) == 1
        for name, its_rows in made.items():
            filled[name] |= {column for row in its_rows for column, value in row.items() if value not in (None, "")}
    empty = {
        f"{view.name}.{name}"
        for view in of_type(resource_type)
        for name, path in paths(view.definition)
        if name not in filled[view.name] and "extension(" not in path
    }
    assert empty == set()


@pytest.mark.parametrize("resource_type", [each.name for each in CATALOG if each.name not in OF_NO_PERSON])
def test_a_column_that_tells_who_somebody_is_says_so(resource_type: str) -> None:
    silent = {
        f"{view.name}.{column.name}"
        for resource in saturated_for_views(resource_type)
        for name, its_rows in rows(resource).items()
        for view in [views()[name]]
        for row in its_rows
        for column in view.columns
        if PERSONAL.search(str(row[column.name])) and "phi" not in column.tags
    }
    assert silent == set()


def test_a_birth_date_is_kept_as_its_year() -> None:
    for view, column in columns():
        if "birth_date" in column.name:
            assert column.tags["phi"] == "year", f"{view.name}.{column.name}"


def test_a_resource_that_says_nothing_gives_one_row_of_nulls() -> None:
    for each in CATALOG:
        made = rows({"resourceType": each.name, "id": "a"})
        main = made.pop(each.key)
        assert [{name for name, value in row.items() if value is not None} for row in main] == [{"id"}]
        assert {name: its for name, its in made.items() if its} == {}


def test_a_patient_as_an_analyst_reads_one() -> None:
    us_core = "http://hl7.org/fhir/us/core/StructureDefinition/us-core-"
    identifier_type = "http://terminology.hl7.org/CodeSystem/v2-0203"
    made = rows(
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
    patient = made["patient"][0]
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
    assert [(row["patient_key"], row["index"], row["family"]) for row in made["patient_name"]] == [
        ("p1", 0, "Before"),
        ("p1", 1, "After"),
    ]
    assert [
        (row["index"], row["organization_key"], row["practitioner_key"]) for row in made["patient_general_practitioner"]
    ] == [
        (0, "o1", None),
        (1, None, "d1"),
    ]


def test_a_moment_and_a_period_both_give_a_start() -> None:
    def start(**effective: object) -> tuple[object, object]:
        row = rows({"resourceType": "Observation", "id": "o", **effective})["observation"][0]
        return row["effective_start"], row["effective_end"]

    assert start(effectiveDateTime="2020-01") == ("2020-01", None)
    assert start(effectiveInstant="2020-01-01T00:00:00Z") == ("2020-01-01T00:00:00Z", None)
    assert start(effectivePeriod={"start": "2020", "end": "2021"}) == ("2020", "2021")
    assert start(effectivePeriod={"end": "2021"}) == (None, "2021")


def test_a_code_of_a_standard_is_found_wherever_it_stands_among_the_codings() -> None:
    codings = [
        {"system": "urn:local", "code": "BP", "display": "Blood pressure"},
        {"system": "http://loinc.org", "code": "85354-9"},
    ]
    row = rows({"resourceType": "Observation", "id": "o", "code": {"coding": codings}})["observation"][0]
    assert (row["code_system"], row["code"], row["code_display"]) == ("urn:local", "BP", "Blood pressure")
    assert (row["loinc_code"], row["snomed_code"]) == ("85354-9", None)


def test_the_rules_of_a_consent_come_out_at_every_depth_and_their_actors_with_them() -> None:
    def actor(code: str) -> Resource:
        return {"role": {"coding": [{"code": code}]}, "reference": {"reference": f"Organization/{code}"}}

    exception = {"type": "permit", "actor": [actor("b")]}
    rule = {"type": "deny", "actor": [actor("a")], "provision": [{"type": "permit", "provision": [exception]}]}
    made = rows({"resourceType": "Consent", "id": "c", "provision": rule})
    assert [(row["index"], row["type"]) for row in made["consent_provision"]] == [
        (0, "deny"),
        (1, "permit"),
        (2, "permit"),
    ]
    assert [
        (row["provision_index"], row["index"], row["organization_key"]) for row in made["consent_provision_actor"]
    ] == [
        (0, 0, "a"),
        (2, 0, "b"),
    ]


# On real input ----------------------------------------------------------------------------------------------------


def resources(source: str) -> Iterator[Resource]:
    if source == "generated":
        lines: Iterator[bytes] = (body for _, body in generate(10, seed=7))
    else:
        files = sorted((SHARED / source).glob("*.ndjson.gz"))
        if not files:
            pytest.skip(f"no {source} beside the checkout")
        lines = (line for file in files for line in gzip.decompress(file.read_bytes()).splitlines())
    for line in lines:
        resource: Resource = json.loads(line)
        if resource["resourceType"] in BY_NAME:
            yield resource


@cache
def real_rows(source: str) -> tuple[Counter[str], dict[str, list[Row]]]:
    """How many resources of each type there are, and the rows of all views."""
    counts: Counter[str] = Counter()
    made: dict[str, list[Row]] = {name: [] for name in views()}
    for resource in resources(source):
        counts[BY_NAME[resource["resourceType"]].key] += 1
        for name, its_rows in rows(resource).items():
            made[name] += its_rows
    return counts, made


@pytest.mark.parametrize("source", ["generated", "r4-examples", "synthea"])
def test_every_real_resource_has_one_row_in_its_main_view(source: str) -> None:
    counts, made = real_rows(source)
    assert {name: len(made[name]) for name in counts} == counts


@pytest.mark.parametrize("source", ["generated", "r4-examples"])
def test_every_main_view_has_rows(source: str) -> None:
    _, made = real_rows(source)
    assert [each.key for each in CATALOG if not made[each.key]] == []


def test_every_child_view_has_rows_somewhere() -> None:
    filled = {
        name
        for source in ("generated", "r4-examples", "synthea")
        for name, its_rows in real_rows(source)[1].items()
        if its_rows
    }
    assert set(views()) - filled == {"immunization_protocol", "immunization_reaction"}


@pytest.mark.parametrize("source", ["generated", "synthea"])
def test_references_become_keys_that_join(source: str) -> None:
    _, made = real_rows(source)
    ids = {each.name: {row["id"] for row in made[each.key]} for each in CATALOG}
    joined = 0
    for view in views().values():
        for name, path in paths(view.definition):
            target = re.search(r"getReferenceKey\((\w+)\)", path)
            if target is not None:
                keys = {row[name] for row in made[view.name]} - {None}
                assert keys <= ids[target[1]], f"{view.name}.{name}"
                joined += len(keys)
    assert joined > 1000
