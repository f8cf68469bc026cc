"""Parsing of ViewDefinitions: columns and their types, fingerprints, and errors with their location."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fhir_assets.errors import ViewError
from fhir_assets.fhir.views import CompiledViews, check_nesting, check_view, load_views, parse_view, read_view

DEFINITION: dict[str, Any] = {
    "resourceType": "ViewDefinition",
    "url": "http://example.org/ViewDefinition/people",
    "version": "1.2",
    "name": "people",
    "title": "People",
    "description": "One row per name",
    "resource": "Patient",
    "constant": [{"name": "use", "valueCode": "official"}],
    "select": [
        {
            "column": [
                {
                    "name": "id",
                    "path": "getResourceKey()",
                    "description": "The key",
                    "tag": [{"name": "a", "value": "b"}],
                },
                {"name": "born", "path": "birthDate"},
            ]
        },
        {"forEach": "name.where(use = %use)", "column": [{"name": "given", "path": "given", "collection": True}]},
    ],
    "where": [{"path": "active"}],
}


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(DEFINITION), **changes}


def with_column(**column: Any) -> dict[str, Any]:
    return changed(select=[{"column": [{"name": "x", "path": "id", **column}]}])


def nested(member: str, depth: int, **more: Any) -> dict[str, Any]:
    """Return a select within ``depth`` others."""
    select: dict[str, Any] = {"column": [{"name": "x", "path": "id"}]}
    for _ in range(depth):
        select = {member: [select], **more}
    return select


def test_a_view_has_the_metadata_of_its_definition() -> None:
    view = parse_view(DEFINITION)
    assert (view.name, view.resource_type, view.url) == ("people", "Patient", DEFINITION["url"])
    assert (view.version, view.title, view.description) == ("1.2", "People", "One row per name")
    assert view.fallbacks == ()


def test_columns_have_the_declared_type_or_the_type_of_their_path() -> None:
    view = parse_view(DEFINITION)
    assert [(c.name, c.type, c.collection) for c in view.columns] == [
        ("id", "string", False),
        ("born", "date", False),
        ("given", "string", True),
    ]
    assert view.columns[0].description == "The key"
    assert view.columns[0].tags == {"a": "b"}
    assert parse_view(with_column(type="code")).columns[0].type == "code"
    assert parse_view(with_column(type="http://hl7.org/fhirpath/System.String")).columns[0].type == "string"


@pytest.mark.parametrize(
    ("path", "type_"),
    [
        ("active", "boolean"),
        ("name.count()", "integer"),
        ("multipleBirth.ofType(integer)", "integer"),
        ("meta.lastUpdated", "instant"),
        ("name.first()", "HumanName"),
        ("name.family.first()", "string"),
        ("name.exists()", "boolean"),
        ("birthDate.lowBoundary()", "date"),
        ("deceased", "string"),
    ],
)
def test_the_type_of_a_path_is_inferred(path: str, type_: str) -> None:
    assert parse_view(with_column(path=path)).columns[0].type == type_


def test_a_surrogate_pair_in_a_path_is_one_character() -> None:
    view = parse_view(with_column(path="'\\ud83d\\ude00'"))
    (rows,) = CompiledViews([replace(view, plan=replace(view.plan, where=()))]).rows({"resourceType": "Patient"})
    assert rows == [("😀",)]


def test_the_fingerprint_depends_on_the_meaning_only() -> None:
    fingerprint = parse_view(DEFINITION).fingerprint
    reworded = changed(title="Other", description="Other", version="9", url="http://x", status="draft", contact=[])
    reworded["select"][0]["column"][0] |= {"description": "Other", "tag": []}
    assert parse_view(reworded).fingerprint == fingerprint
    others = [
        changed(where=[]),
        changed(name="others"),
        changed(constant=[{"name": "use", "valueCode": "usual"}]),
        changed(constant=[{"name": "use", "valueString": "official"}]),
        changed(select=DEFINITION["select"][:1]),
    ]
    assert len({fingerprint, *(parse_view(other).fingerprint for other in others)}) == len(others) + 1


@pytest.mark.parametrize(
    ("definition", "location", "message"),
    [
        ({}, "resource", "is missing"),
        (changed(resource="Patiens"), "resource", 'R4 has no resource "Patiens"; did you mean "Patient"?'),
        (changed(resource="HumanName"), "resource", "R4 has no resource"),
        (changed(name="1st"), "name", "not begin with a digit"),
        (changed(select=[]), "select", "is missing"),
        (changed(select={}), "select", "must be an array of objects"),
        (changed(select=[{}]), "select[0]", "has neither column nor select nor unionAll"),
        (with_column(path="birthdate"), "select[0].column[0].path", 'did you mean "birthDate"?'),
        (with_column(path=1), "select[0].column[0].path", "must be text, not int"),
        (with_column(path="name.("), "select[0].column[0].path", "at character 6"),
        (with_column(name="a-b"), "select[0].column[0].name", "must consist of A-Z, a-z, 0-9 and _"),
        (with_column(type="strng"), "select[0].column[0].type", 'did you mean "string"?'),
        (with_column(collection="yes"), "select[0].column[0].collection", "must be true or false"),
        (
            changed(select=[{"column": [{"name": "x", "path": "id"}, {"name": "x", "path": "id"}]}]),
            "select",
            'two columns have the name "x"',
        ),
        (changed(constant=[{"name": "use"}]), "constant[0]", "one value[x]"),
        (changed(constant=[{"name": "use", "valuePeriod": {}}]), "constant[0].valuePeriod", "primitive"),
        (changed(constant=[]), "select[1].forEach", 'there is no constant "%use"'),
        (changed(where=[{"path": "name.family"}]), "where[0].path", "must give a boolean, not string"),
        (changed(where=[{}]), "where[0].path", "is missing"),
        (changed(select=[{"forEach": 1}]), "select[0].forEach", "must be a FHIRPath expression, not int"),
        (
            changed(select=[{"forEach": "name", "repeat": ["name"], "column": []}]),
            "select[0]",
            "has both forEach and repeat",
        ),
        (changed(select=[{"repeat": "item"}]), "select[0].repeat", "must be an array of FHIRPath expressions"),
        (
            changed(select=[{"repeat": ["itemm"], "column": [{"name": "x", "path": "id"}]}]),
            "select[0].repeat[0]",
            'no type has an element "itemm"; did you mean "item"?',
        ),
        (
            changed(
                select=[
                    {"unionAll": [{"column": [{"name": "x", "path": "id"}]}, {"column": [{"name": "y", "path": "id"}]}]}
                ]
            ),
            "select[0].unionAll[1]",
            "has the columns y; the first has x",
        ),
        (changed(description="a\0b"), "description", "NUL"),
        (changed(version=5), "version", "must be text, not int"),
        (with_column(description={"not": "text"}), "select[0].column[0].description", "must be text, not dict"),
        (with_column(description="\0"), "select[0].column[0].description", "NUL"),
        (with_column(tag=[{"name": ["phi"], "value": "none"}]), "select[0].column[0].tag[0].name", "must be text"),
        (with_column(tag=[{"name": "phi", "value": ["none"]}]), "select[0].column[0].tag[0].value", "must be text"),
        (changed(constant=[{"name": "use", "valueString": "\0"}]), "constant[0].valueString", "NUL"),
        (with_column(path="'\\u0000'"), "select[0].column[0].path", "NUL"),
        (with_column(path="'\\ud800'"), "select[0].column[0].path", "half of a surrogate pair"),
        (with_column(path="true" + ".not()" * 3000), "select[0].column[0].path", "nested too deeply"),
        (with_column(path="(" * 3000 + "id" + ")" * 3000), "select[0].column[0].path", "nested too deeply"),
        (changed(select=[nested("select", 60)]), "select[0]", "more than 50 selects one within another"),
        (changed(select=[nested("unionAll", 200)]), "select[0]", "more than 50 selects one within another"),
    ],
)
def test_an_invalid_definition_is_an_error_with_file_location_and_reason(
    definition: dict[str, Any], location: str, message: str
) -> None:
    with pytest.raises(ViewError) as error:
        parse_view(definition, Path("views/people.json"))
    assert str(error.value).startswith(f"views/people.json: {location}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "definition",
    [
        with_column(path=".".join(["extension"] * 30) + ".url.first()"),
        with_column(path="iif(true, " * 120 + "1" + ", 2)" * 120),
        with_column(path=" and ".join(["true"] * 210)),
        changed(select=[nested("select", 25, forEach="extension")]),
        changed(select=[nested("select", 25, forEachOrNull="extension")]),
        changed(select=[nested("select", 25, repeat=["extension"])]),
    ],
)
def test_what_python_cannot_compile_is_an_error_with_view_and_column(definition: dict[str, Any]) -> None:
    view = parse_view(definition)
    with pytest.raises(ViewError, match="view people, column x: its path and the selects around it are nested too"):
        CompiledViews([view])
    with pytest.raises(ViewError, match="view people, column x"):
        check_nesting(view)


ITEMS = ".".join(["item"] * 23)
ANSWERS = {"resource": "QuestionnaireResponse", "name": "answers"}
ID = {"name": "x", "path": "id"}


def siblings(**fields: Any) -> list[dict[str, Any]]:
    return [{**fields, "column": [{"name": f"c{number}", "path": "family"}]} for number in range(21)]


@pytest.mark.parametrize(
    "definition",
    [
        {**ANSWERS, "select": [{"column": [{"name": "x", "path": f"/* it's */ {ITEMS}.linkId.first() /* it's */"}]}]},
        {**ANSWERS, "select": [{"column": [{"name": "x", "path": f"// it's\n{ITEMS}.linkId.first() // it's"}]}]},
        {**ANSWERS, "select": [{"repeat": [ITEMS], "column": [{"name": "x", "path": "linkId"}]}]},
        {**ANSWERS, "select": [{"column": [ID]}], "where": [{"path": f"{ITEMS}.exists()"}]},
        {**ANSWERS, "select": [{"column": [ID]}], "where": [{"path": "id.exists()"}] * 120},
        {"resource": "Patient", "select": siblings(forEach="name")},
        {"resource": "Patient", "select": siblings(forEachOrNull="name")},
    ],
    ids=[
        "a comment with a quote",
        "a line with a quote",
        "repeat",
        "where",
        "many where",
        "siblings",
        "siblings or null",
    ],
)
def test_every_part_of_a_view_counts_for_its_nesting(definition: dict[str, Any]) -> None:
    view = parse_view(definition)
    with pytest.raises(ViewError, match="nested too"):
        CompiledViews([view])
    with pytest.raises(ViewError, match="nested too"):
        check_nesting(view)


def test_a_definition_that_is_not_an_object_is_an_error() -> None:
    with pytest.raises(ViewError, match="is not a JSON object"):
        parse_view([])  # type: ignore[arg-type]


def test_check_view_returns_every_problem() -> None:
    definition = changed(where=[{"path": "id"}], select=[{"column": [{"name": "x", "path": "idd"}]}])
    definition["select"].append({"column": [{"name": "y", "path": "birthDate", "type": "boolean"}]})
    definition["select"].append({"column": [{"name": "z", "path": "name.family.aggregate($this, '')"}]})
    assert [(problem.location, problem.severity) for problem in check_view(definition)] == [
        ("select[0].column[0].path", "error"),
        ("select[1].column[0].type", "warning"),
        ("select[2].column[0].path", "warning"),
        ("where[0].path", "error"),
    ]
    assert check_view(DEFINITION) == []


def test_an_invalid_view_does_not_prevent_loading_the_others(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps(DEFINITION))
    (tmp_path / "misspelt.json").write_text(json.dumps(with_column(path="idd")))
    (tmp_path / "no.json").write_text("{")
    (tmp_path / "readme.txt").write_text("not a view")
    view_set = load_views([tmp_path])
    assert [view.name for view in view_set.views] == ["people"]
    assert [broken.path.name for broken in view_set.broken] == ["misspelt.json", "no.json"]
    assert all(str(broken.path) in broken.message for broken in view_set.broken)


def test_of_two_views_with_the_same_name_the_second_is_reported(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(DEFINITION))
    view_set = load_views([tmp_path])
    assert [view.path for view in view_set.views] == [tmp_path / "a.json"]
    assert '"people" is already the name of' in view_set.broken[0].message


def test_views_of_several_folders_are_sorted_by_name(tmp_path: Path) -> None:
    for folder, name in (("one", "zebra"), ("two", "ant")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.json").write_text(json.dumps(changed(name=name)))
    view_set = load_views([tmp_path / "one", tmp_path / "two", tmp_path / "none"])
    assert [view.name for view in view_set.views] == ["ant", "zebra"]


def test_a_view_without_a_name_is_named_by_its_file(tmp_path: Path) -> None:
    definition = changed()
    del definition["name"]
    (tmp_path / "folk.json").write_text(json.dumps(definition))
    assert read_view(tmp_path / "folk.json").name == "folk"
    assert parse_view(definition).name == "patient"


def test_a_missing_file_is_a_view_error(tmp_path: Path) -> None:
    with pytest.raises(ViewError, match="cannot be read"):
        read_view(tmp_path / "none.json")
