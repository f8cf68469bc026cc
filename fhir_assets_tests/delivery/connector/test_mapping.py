"""The mapping from source rows to resources."""

import json
from pathlib import Path
from typing import Any

import pytest

from fhir_assets.delivery.connector.mapping import BUILT_IN, Identifier, load_mapping
from fhir_assets.errors import ConfigurationError

PATIENT = load_mapping()["patient"]


def map_row(row: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    return PATIENT.build_resource(row, {"other_identifiers": others})


def test_an_empty_row_gives_an_empty_resource() -> None:
    assert map_row({}) == {"resourceType": "Patient"}
    assert map_row({"name_family": "  ", "phone_number": ""}) == {"resourceType": "Patient"}


def test_an_element_with_constants_only_is_left_out() -> None:
    assert map_row({"email": "a@example.org"})["telecom"] == [{"system": "email", "value": "a@example.org"}]


@pytest.mark.parametrize(
    ("stored", "code"), [("M", "male"), (" Female ", "female"), ("o", "other"), ("?", "unknown"), (None, None)]
)
def test_stored_codes_are_mapped_to_fhir_codes(stored: str | None, code: str | None) -> None:
    assert map_row({"gender": stored}).get("gender") == code


def test_deceased_is_a_date_if_the_row_has_one() -> None:
    assert map_row({"deceased": True, "deceased_at": "2024-01-01T00:00:00Z"}) == {
        "resourceType": "Patient",
        "deceasedDateTime": "2024-01-01T00:00:00Z",
    }
    assert map_row({"deceased": False})["deceasedBoolean"] is False


def test_a_duplicate_identifier_is_sent_once() -> None:
    row = {"identifier_system": "s", "identifier_value": "1"}
    assert map_row(row, row, {"identifier_system": "t", "identifier_value": "2"})["identifier"] == [
        {"system": "s", "value": "1"},
        {"system": "t", "value": "2"},
    ]


@pytest.mark.parametrize("row", [{}, {"identifier_value": "1"}, {"identifier_system": "s", "identifier_value": " "}])
def test_an_identifier_without_system_or_value_is_ignored(row: dict[str, Any]) -> None:
    assert PATIENT.read_identifier(row) is None


def test_a_token_escapes_the_special_characters_of_search() -> None:
    assert Identifier("s", "a|b,c$d\\e").token == "s|a\\|b\\,c\\$d\\\\e"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("{", "is not valid"),
        ('{"sources": [{"name": "x"}]}', "`\\$.sources\\[0\\]`"),
        (
            json.dumps({"sources": [{**json.loads(BUILT_IN.read_text())["sources"][0], "children": {}}]}),
            "no child 'other_identifiers'",
        ),
    ],
)
def test_the_error_of_an_invalid_mapping_says_where(tmp_path: Path, broken: str, message: str) -> None:
    path = tmp_path / "mapping.json"
    path.write_text(broken)
    with pytest.raises(ConfigurationError, match=message):
        load_mapping(path)


def test_a_missing_mapping_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="CONNECTOR_MAPPING"):
        load_mapping(tmp_path / "none.json")
