"""Only references to resources of our own sources make keys; every other reference is counted by its form."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from fhir_assets.fhir.references import find_keyless, normalize_bases, split_reference
from fhir_assets.fhir.views import CompiledViews, parse_view

OURS = normalize_bases(["https://h.example/fhir/", ""])
KEYS = [
    ("Patient/1", "1"),
    ("Patient/1/_history/2", "1"),
    ("https://h.example/fhir/Patient/1", "1"),
    ("http://h.example/fhir/Patient/1/_history/2", "1"),
]
KEYLESS = [
    ("https://other.example/fhir/Patient/1", "absolute Patient"),
    ("https://h.example/other/Patient/1/_history/3", "absolute Patient"),
    ("urn:uuid:0f2a1c34-0000-4000-8000-00000000000b", "urn"),
    ("urn:oid:1.2.3", "urn"),
    ("Patient?identifier=http://sys.example/a|1", "conditional Patient"),
    ("https://other.example/fhir/Patient?identifier=1", "conditional Patient"),
    ("Patient", "other"),
    ("../Patient/1", "other"),
    ("ftp://h.example/fhir/Patient/1", "absolute Patient"),
]


def row(reference: dict[str, Any], bases: frozenset[str] | None) -> list[object]:
    """Return the two keys of an Observation with this subject."""
    definition = {
        "resource": "Observation",
        "select": [
            {
                "column": [
                    {"name": "typed", "path": "subject.getReferenceKey(Patient)"},
                    {"name": "any", "path": "subject.getReferenceKey()"},
                ]
            }
        ],
    }
    view = parse_view(definition, None, bases)
    ((values,),) = CompiledViews([view]).rows({"resourceType": "Observation", "subject": reference})
    return list(values)


@pytest.mark.parametrize(("literal", "key"), [*KEYS, *((literal, None) for literal, _ in KEYLESS), ("#c", None)])
def test_only_a_reference_to_our_own_sources_makes_a_key(literal: str, key: str | None) -> None:
    assert row({"reference": literal}, OURS) == [key, key]


def test_without_bases_any_absolute_reference_makes_a_key() -> None:
    assert row({"reference": "https://other.example/Patient/1"}, None) == ["1", "1"]
    assert split_reference("https://other.example/Patient/1", None) == ("Patient", "1")


def test_the_bases_of_a_view_survive_pickling() -> None:
    view = parse_view({"resource": "Patient", "select": [{"column": [{"name": "id", "path": "id"}]}]}, Path("v"), OURS)
    assert pickle.loads(pickle.dumps(view)).reference_bases == OURS


@pytest.mark.parametrize("escaped", [False, True])
def test_a_reference_without_a_key_is_counted_by_its_form(escaped: bool) -> None:
    def find(*references: dict[str, Any]) -> tuple[str, ...]:
        resource = {"resourceType": "List", "entry": [{"item": reference} for reference in references]}
        text = json.dumps(resource, indent=1 if escaped else None)
        return find_keyless(resource, (text.replace("/", "\\/") if escaped else text).encode(), OURS)

    assert find(*({"reference": literal} for literal, _ in KEYS), {"reference": "#c"}, {"display": "x"}) == ()
    for literal, form in KEYLESS:
        assert find({"reference": literal}) == (form,)
    assert find({"identifier": {"value": "1"}}, {"type": "Patient", "identifier": {"value": "2"}}) == (
        "identifier",
        "identifier Patient",
    )
    assert find({"identifier": {"value": "1"}, "reference": "Patient/1"}) == ()
