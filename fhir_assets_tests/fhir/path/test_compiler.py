"""The compiler: error messages, result types, the fallback to fhirpathpy, constants, hooks and three-valued logic."""

from copy import deepcopy
from typing import Any

import pytest

from fhir_assets.errors import FhirPathError
from fhir_assets.fhir.path import Constant, compile_path
from fhir_assets_tests.support.fhirpath_sample import OBSERVATION, PATIENT


@pytest.mark.parametrize(
    ("root", "expression", "message"),
    [
        ("Patient", "birthdate", 'Patient has no element "birthdate"; did you mean "birthDate"?'),
        ("Patient", "name.where(famly = 'x')", 'HumanName has no element "famly"; did you mean "family"?'),
        ("Patient", "deceasedBoolean", "write deceased.ofType(boolean)"),
        ("Patient", "contact.nam.family", 'Patient.contact has no element "nam"; did you mean "name"?'),
        ("Patient", "contained.famly", 'no type has an element "famly"; did you mean "family"?'),
        ("Patient", "name.wher(use = 'x')", "there is no function wher(); did you mean"),
        ("Patient", "name.first(1)", "first() takes 0 arguments, not 1"),
        ("Patient", "'a'.substring()", "substring() takes 1 to 2 arguments, not 0"),
        ("Patient", "deceased.ofType(bolean)", 'there is no type "bolean"; did you mean "boolean"?'),
        ("Patient", "deceased.ofType(1)", "a type is written as its name"),
        ("Patient", "%resorce.id", 'there is no constant "%resorce"; did you mean "resource"?'),
        ("Patient", "birthDate > 'x'", '">" cannot compare a date with a text'),
        ("Patient", "1.upper()", "upper() takes a text, not a number"),
        ("Patient", "birthDate.abs()", "abs() takes a number, not a date"),
        ("Patiente", "id", 'there is no type "Patiente"; did you mean "Patient"?'),
    ],
)
def test_an_unknown_name_is_an_error_that_suggests_the_nearest_name(root: str, expression: str, message: str) -> None:
    with pytest.raises(FhirPathError) as error:
        compile_path(expression, root_type=root)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("expression", "types", "many"),
    [
        ("id", {"id"}, False),
        ("birthDate", {"date"}, False),
        ("name", {"HumanName"}, True),
        ("name.first().family", {"string"}, False),
        ("name.given", {"string"}, True),
        ("contact", {"Patient.contact"}, True),
        ("deceased", {"boolean", "dateTime"}, False),
        ("name.exists() and active", {"boolean"}, False),
        ("name.count() + 1", {"integer"}, False),
        ("name.count() / 2", {"decimal"}, False),
        ("iif(active, 'a', 1)", {"string", "integer"}, False),
        ("generalPractitioner.getReferenceKey()", {"string"}, True),
    ],
)
def test_the_types_of_the_result_are_known(expression: str, types: set[str], many: bool) -> None:
    path = compile_path(expression, root_type="Patient")
    assert path.types is not None
    assert (set(path.types), path.many) == (types, many)


def test_a_result_whose_type_depends_on_the_resource_has_no_types() -> None:
    assert compile_path("descendants()", root_type="Patient").types is None


VALUES = {"T": "true", "F": "false", "E": "{}"}
TABLES = {
    "and": {"TT": True, "TF": False, "TE": None, "FT": False, "FF": False, "FE": False, "ET": None, "EF": False},
    "or": {"TT": True, "TF": True, "TE": True, "FT": True, "FF": False, "FE": None, "ET": True, "EF": None},
    "xor": {"TT": False, "TF": True, "TE": None, "FT": True, "FF": False, "FE": None, "ET": None, "EF": None},
    "implies": {"TT": True, "TF": False, "TE": None, "FT": True, "FF": True, "FE": True, "ET": True, "EF": None},
}


@pytest.mark.parametrize("operator", TABLES)
def test_logic_has_three_values(operator: str) -> None:
    results = {
        operands: compile_path(f"{VALUES[operands[0]]} {operator} {VALUES[operands[1]]}", root_type="Patient").test(
            {"resourceType": "Patient"}
        )
        for operands in (*TABLES[operator], "EE")
    }
    assert results == TABLES[operator] | {"EE": None}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [("active", True), ("active.not()", False), ("photo.title = 'x'", None), ("gender", True), ("photo", None)],
)
def test_a_single_value_that_is_not_a_boolean_counts_as_true(expression: str, expected: bool | None) -> None:
    assert compile_path(expression, root_type="Patient").test(PATIENT) is expected


@pytest.mark.parametrize("expression", ["name.family and active", "name.given.upper()", "name.use.single()"])
def test_several_values_where_one_is_allowed_is_an_error_without_the_values(expression: str) -> None:
    with pytest.raises(FhirPathError, match="several values where one is allowed") as error:
        compile_path(expression, root_type="Patient")(PATIENT)
    assert "Olsen" not in str(error.value)


def test_a_resource_that_is_not_r4_is_an_error_without_its_values() -> None:
    with pytest.raises(FhirPathError, match="not have the type that FHIR R4 defines") as error:
        compile_path("name.given", root_type="Patient")({"resourceType": "Patient", "name": [{"given": 5}, "Olsen"]})
    assert "Olsen" not in str(error.value)


def test_fhirpathpy_evaluates_unsupported_expressions_without_changing_the_resource() -> None:
    path = compile_path("name.given.aggregate($this & $total, '')", root_type="Patient")
    patient: dict[str, Any] = {"resourceType": "Patient", "name": [{"given": ["b", "a"]}]}
    before = deepcopy(patient)
    assert path.fallback
    assert path(patient) == ["ab"]
    assert patient == before


def test_an_error_of_the_fallback_contains_no_values() -> None:
    path = compile_path("name.family.aggregate($this & 1, '')", root_type="Patient")
    with pytest.raises(FhirPathError) as error:
        path({"resourceType": "Patient", "name": [{"family": "Olsen"}]})
    assert "Olsen" not in str(error.value)


def test_a_fallback_gives_plain_values() -> None:
    path = compile_path("birthDate + 1 year", root_type="Patient")
    assert path.fallback
    (result,) = path({"resourceType": "Patient", "birthDate": "1970-06-15"})
    assert (type(result), result) == (str, "1971-06-15")


def test_a_fallback_works_within_an_element() -> None:
    path = compile_path("telecom.rank.aggregate($this + $total, 0)", root_type="Patient.contact")
    assert path({"telecom": [{"rank": 2}, {"rank": 3}]}) == [5]


def test_a_focus_inside_a_resource_can_refer_to_the_resource() -> None:
    path = compile_path("family & ' ' & %resource.id", root_type="HumanName", resource_type="Patient")
    assert path({"family": "Olsen"}, resource=PATIENT) == ["Olsen p1"]


def test_the_root_resource_of_a_contained_one_is_its_container() -> None:
    path = compile_path("%rootResource.contained.id contains id", root_type="Practitioner")
    contained = PATIENT["contained"][0]
    assert path.test(contained, resource=contained, root=PATIENT) is True


def test_constants_have_their_fhir_type() -> None:
    constants: dict[str, Any] = {"since": Constant("1970", frozenset({"date"})), "use": "usual", "n": 1}
    assert compile_path("birthDate > %since", root_type="Patient", constants=constants).test(PATIENT) is None
    assert compile_path("name.where(use = %use).given", root_type="Patient", constants=constants)(PATIENT) == ["Annie"]
    assert compile_path("name[%n].use", root_type="Patient", constants=constants)(PATIENT) == ["usual"]


def test_hooks_are_additional_functions() -> None:
    calls: list[tuple[object, ...]] = []

    def member_of(value: object, value_set: object) -> bool:
        calls.append((value, value_set))
        return False

    path = compile_path("status.memberOf('x')", root_type="Observation", hooks={"memberOf": member_of})
    assert path.test(OBSERVATION) is False
    assert calls == [("final", "x")]


def test_the_right_operand_is_not_evaluated_where_the_left_one_decides() -> None:
    path = compile_path("photo.exists() and name.family.upper() = 'X'", root_type="Patient")
    assert path.test(PATIENT) is False


def test_an_element_that_occurs_several_times_is_read_once() -> None:
    path = compile_path("name.first().family & name.first().use & name.first().text", root_type="Patient")
    assert path(PATIENT) == ["Olsenofficial"]
    assert path.function.__source__.count("get('name')") == 1  # type: ignore[attr-defined]
