"""The rows of compiled views, feature by feature."""

import pickle
from typing import Any

import pytest

from fhir_assets.fhir.views import CompiledViews, RowError, View, parse_view

PATIENT: dict[str, Any] = {
    "resourceType": "Patient",
    "id": "p1",
    "gender": "female",
    "name": [{"use": "official", "family": "Olsen", "given": ["Ann", "Bo"]}, {"family": "Berg"}],
    "telecom": [{"system": "phone", "value": "1"}, {"system": "email", "value": "2"}],
    "contact": [{"name": {"family": "Kin"}, "telecom": [{"value": "3"}]}, {"name": {"family": "Kith"}}],
}
RESPONSE: dict[str, Any] = {
    "resourceType": "QuestionnaireResponse",
    "id": "q1",
    "item": [
        {
            "linkId": "1",
            "item": [{"linkId": "1.1", "answer": [{"valueString": "x", "item": [{"linkId": "1.1.1"}]}]}],
        },
        {"linkId": "2"},
    ],
}


def column(path: str, name: str | None = None, **more: Any) -> dict[str, Any]:
    return {"name": name or "".join(c for c in path if c.isalnum()), "path": path, **more}


def columns(*paths: str) -> dict[str, Any]:
    return {"column": [column(path) for path in paths]}


def view(*selects: dict[str, Any], **more: Any) -> View:
    return parse_view({"resource": "Patient", "select": list(selects), **more})


def rows(*selects: dict[str, Any], resource: dict[str, Any] = PATIENT, **more: Any) -> list[tuple[object, ...]]:
    return CompiledViews([view(*selects, **more)]).rows(resource)[0]


def test_columns_of_one_resource_are_one_row() -> None:
    assert rows(columns("id", "gender", "birthDate")) == [("p1", "female", None)]


def test_for_each_gives_one_row_per_item() -> None:
    assert rows(columns("id"), {"forEach": "name", **columns("family")}) == [("p1", "Olsen"), ("p1", "Berg")]


def test_for_each_of_an_empty_collection_gives_no_row() -> None:
    assert rows(columns("id"), {"forEach": "photo", **columns("title")}) == []


def test_for_each_or_null_of_an_empty_collection_gives_a_row_of_nulls() -> None:
    nested = {"forEachOrNull": "photo", **columns("title", "'constant'"), "select": [columns("url")]}
    assert rows(columns("id"), nested) == [("p1", None, None, None)]


def test_sibling_selects_give_their_cross_product() -> None:
    result = rows({"forEach": "name", **columns("family")}, {"forEach": "telecom", **columns("value")})
    assert result == [("Olsen", "1"), ("Olsen", "2"), ("Berg", "1"), ("Berg", "2")]


def test_the_cross_product_includes_for_each_or_null_and_a_union() -> None:
    union = {"unionAll": [{"forEach": "telecom", **columns("value")}, {"column": [column("id", "value")]}]}
    result = rows({"forEachOrNull": "photo", **columns("title")}, union, {"forEach": "name", **columns("family")})
    assert [row[1:] for row in result] == [(value, name) for value in ("1", "2", "p1") for name in ("Olsen", "Berg")]


def test_a_path_after_a_for_each_is_evaluated_on_its_own_focus() -> None:
    assert rows({"forEach": "contact.first()", **columns("name.family")}, columns("id")) == [("Kin", "p1")]


def test_nested_for_each_starts_from_the_outer_item() -> None:
    nested = {"forEach": "contact", **columns("name.family"), "select": [{"forEach": "telecom", **columns("value")}]}
    assert rows(nested) == [("Kin", "3")]


def test_union_all_gives_the_rows_of_each_branch() -> None:
    branches = [{"forEach": "telecom", **columns("value")}, {"forEach": "contact.telecom", **columns("value")}]
    assert rows({**columns("id"), "unionAll": branches}) == [("p1", "1"), ("p1", "2"), ("p1", "3")]


def test_repeat_traverses_all_paths_depth_first() -> None:
    definition = {
        "resource": "QuestionnaireResponse",
        "select": [{"repeat": ["item", "answer.item"], "column": [column("%rowIndex", "n"), column("linkId")]}],
    }
    result = CompiledViews([parse_view(definition)]).rows(RESPONSE)[0]
    assert result == [(0, "1"), (1, "1.1"), (2, "1.1.1"), (3, "2")]


def test_row_index_counts_within_the_nearest_iteration() -> None:
    nested = {
        "forEach": "contact",
        "column": [column("%rowIndex", "outer")],
        "select": [{"forEachOrNull": "telecom", "column": [column("%rowIndex", "inner"), column("value")]}],
    }
    assert rows({"column": [column("%rowIndex", "top")]}, nested) == [(0, 0, 0, "3"), (0, 1, 0, None)]


def test_columns_have_the_order_of_the_specification() -> None:
    select = {
        "unionAll": [{"column": [column("'e'")]}, {"column": [column("'f'", "e")]}],
        "select": [{"forEach": "name", "column": [column("'c'")]}],
        "column": [column("'a'")],
    }
    assert [result.name for result in view(select, {"column": [column("'g'")]}).columns] == ["a", "c", "e", "g"]


def test_where_keeps_resources_for_which_all_conditions_are_true() -> None:
    conditions = [{"path": "gender = 'female'"}, {"path": "name.exists()"}]
    assert rows(columns("id"), where=conditions) == [("p1",)]
    assert rows(columns("id"), where=[*conditions, {"path": "active"}]) == []


def test_a_where_of_unknown_type_must_give_a_boolean() -> None:
    with pytest.raises(RowError, match="column where"):
        rows(columns("id"), where=[{"path": "descendants().where($this = 'phone').first()"}])


@pytest.mark.parametrize(
    ("constant", "path", "expected"),
    [
        ({"valueString": "official"}, "name.where(use = %c).family", "Olsen"),
        ({"valueCode": "female"}, "gender = %c", True),
        ({"valueInteger": 1}, "name[%c].family", "Berg"),
        ({"valueBoolean": True}, "name.exists() = %c", True),
        ({"valueDecimal": 1.5}, "1.5 = %c", True),
        ({"valueDate": "1970-01-01"}, "@1970-01-01 = %c", True),
        ({"valueDateTime": "1970-01-01T00:00:00Z"}, "@1970-01-01T01:00:00+01:00 = %c", True),
        ({"valueTime": "10:30:00"}, "@T10:30:00 = %c", True),
        ({"valueId": "p1"}, "id = %c", True),
    ],
)
def test_constants(constant: dict[str, Any], path: str, expected: object) -> None:
    assert rows({"column": [column(path, "a")]}, constant=[{"name": "c", **constant}]) == [(expected,)]


def test_a_collection_is_a_list_even_with_one_value_or_no_value() -> None:
    select = {
        "column": [column(path, collection=True) for path in ("name.given", "gender", "photo.title", "birthDate")]
    }
    assert rows(select) == [(["Ann", "Bo"], ["female"], [], [])]


def test_the_error_for_several_values_names_the_column_but_not_the_values() -> None:
    with pytest.raises(RowError) as error:
        rows(columns("id", "name.family"), name="people")
    assert (error.value.view, error.value.column) == ("people", "namefamily")
    assert "several values where one is allowed" in error.value.message
    assert "Olsen" not in str(error.value)


def test_two_values_are_allowed_one_at_a_time() -> None:
    assert rows({"forEach": "name", **columns("family")}) == [("Olsen",), ("Berg",)]


def test_the_error_for_a_resource_that_is_not_r4_names_the_column() -> None:
    with pytest.raises(RowError) as error:
        rows(columns("id", "gender", "maritalStatus.text"), resource={**PATIENT, "maritalStatus": "single"})
    assert error.value.column == "maritalStatustext"
    assert "single" not in str(error.value)


@pytest.mark.parametrize("value", [1, True, ["text"], [1], [[]], [None], {"given": {}}, "text"])
def test_any_invalid_element_value_is_a_row_error(value: object) -> None:
    compiled = CompiledViews([view({"forEachOrNull": "name.where(use != 'x')", **columns("given")})])
    with pytest.raises(RowError, match="not have the type that FHIR R4 defines"):
        compiled.rows({"resourceType": "Patient", "name": value})


def test_many_sibling_selects_compile() -> None:
    selects = [{"forEach": "contact.telecom", "column": [column("value", f"c{n}")]} for n in range(15)]
    assert rows(*selects) == [("3",) * 15]


def test_a_row_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(RowError("v", "c", "why")))
    assert (error.view, error.column, str(error)) == ("v", "c", "view v, column c: why")


def test_all_views_of_a_type_come_from_one_pass() -> None:
    views = [view(columns("id", "gender")), view({"forEach": "name", **columns("family")}), view(columns("id"))]
    result = CompiledViews(views).rows(PATIENT)
    assert result == [[("p1", "female")], [("Olsen",), ("Berg",)], [("p1",)]]


def test_views_of_two_resource_types_cannot_be_compiled_together() -> None:
    with pytest.raises(ValueError, match="several resource types"):
        CompiledViews([view(columns("id")), parse_view({"resource": "Device", "select": [columns("id")]})])


def test_compiled_views_can_be_pickled() -> None:
    views = CompiledViews([view(columns("id", "name.given.join(' ')"))], empty_join=False)
    again = pickle.loads(pickle.dumps(views))
    assert again.rows(PATIENT) == [[("p1", "Ann Bo")]]
    assert again.empty_join is False
    assert again.views == views.views


@pytest.mark.parametrize(("empty_join", "expected"), [(True, ""), (False, None)])
def test_join_of_an_empty_collection_is_the_empty_string_or_null(empty_join: bool, expected: str | None) -> None:
    views = CompiledViews([view(columns("photo.title.join(',')"))], empty_join=empty_join)
    assert views.rows(PATIENT) == [[(expected,)]]


def test_rows_do_not_share_lists_with_the_resource() -> None:
    ((given,),) = rows({"forEach": "name.first()", "column": [column("given", collection=True)]})
    assert given == PATIENT["name"][0]["given"]
    assert given is not PATIENT["name"][0]["given"]


def test_a_path_that_fhirpathpy_evaluates_is_listed_in_fallbacks() -> None:
    path = "given.aggregate($this & $total, '')"
    compiled = view(columns("id"), {"forEach": "name", "column": [column(path, "all")]})
    assert compiled.fallbacks == (path,)
    assert CompiledViews([compiled]).rows(PATIENT) == [[("p1", "BoAnn"), ("p1", "")]]
