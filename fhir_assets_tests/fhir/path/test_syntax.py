"""The parser of FHIRPath: precedence, literals, errors."""

import pytest

from fhir_assets.errors import FhirPathError
from fhir_assets.fhir.path.syntax import Call, Literal, Operation, Sign, TypeTest, find_specials, parse


def test_operators_have_the_precedence_of_the_grammar() -> None:
    tree = parse("a or b and c = 1 + 2 * 3")
    assert isinstance(tree, Operation)
    assert tree.operator == "or"
    assert isinstance(tree.right, Operation)
    assert tree.right.operator == "and"
    comparison = tree.right.right
    assert isinstance(comparison, Operation)
    assert comparison.operator == "="
    assert isinstance(comparison.right, Operation)
    assert comparison.right.operator == "+"


def test_operators_of_one_level_bind_to_the_left() -> None:
    tree = parse("7 - 2 - 1")
    assert isinstance(tree, Operation)
    assert isinstance(tree.left, Operation)


def test_a_sign_applies_to_the_entire_path_after_it() -> None:
    tree = parse("-1.abs()")
    assert isinstance(tree, Sign)
    assert isinstance(tree.operand, Call)


def test_a_type_may_be_qualified() -> None:
    tree = parse("value is FHIR.Quantity")
    assert isinstance(tree, TypeTest)
    assert tree.type == "FHIR.Quantity"


@pytest.mark.parametrize("name", ["contains", "in", "is", "as", "div", "mod", "`div`", "and"])
def test_a_keyword_may_name_an_element(name: str) -> None:
    parse(f"expansion.{name}.code")


@pytest.mark.parametrize(
    ("text", "type_", "value"),
    [
        (r"'it\'s \u0041\n'", "string", "it's A\n"),
        (r"'\d+'", "string", r"\d+"),
        ("true", "boolean", True),
        ("12", "integer", 12),
        ("@2024-01", "date", "2024-01"),
        ("@2024-01-15T10:30:00Z", "dateTime", "2024-01-15T10:30:00Z"),
        ("@2024T", "dateTime", "2024"),
        ("@T10:30", "time", "10:30"),
        ("{}", "empty", None),
    ],
)
def test_literals_have_their_type(text: str, type_: str, value: object) -> None:
    tree = parse(text)
    assert isinstance(tree, Literal)
    assert (tree.type, tree.value) == (type_, value)


def test_a_number_with_a_unit_is_a_quantity() -> None:
    assert [parse(text) for text in ("4 days", "4 'mg'")] == [
        Literal(0, "Quantity", 4, "day"),
        Literal(0, "Quantity", 4, "mg"),
    ]


def test_comments_and_white_space_are_ignored() -> None:
    assert parse("1 // one") == parse("1 /* the\nfirst */") == parse("1")


def test_the_specials_of_a_tree_are_found_at_any_depth() -> None:
    assert set(find_specials(parse("a.where($this > 1 and b.select($index + 1).exists())"))) == {"$this", "$index"}


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("@@", 1, ""),
        ("a.", 3, "a name"),
        ("a b", 3, "an operator or the end"),
        ("(a", 3, '")"'),
        ("a[1", 4, '"]"'),
        ("name.where(use=)", 16, "a term"),
        ("", 1, "a term"),
        ("'open", 1, ""),
    ],
)
def test_an_error_has_the_position_and_the_expected_token(text: str, position: int, expected: str) -> None:
    with pytest.raises(FhirPathError) as error:
        parse(text)
    assert f"at character {position}" in str(error.value)
    assert expected in str(error.value)
