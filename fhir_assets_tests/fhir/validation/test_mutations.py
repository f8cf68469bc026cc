"""Each rule, violated in turn in a valid resource of each type, is reported with that rule at that path."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from fhir_assets.catalog import CATALOG
from fhir_assets.fhir.validation import Validator
from fhir_assets.fhir.validation.rules import PRIMITIVES, Element
from fhir_assets_tests.support.resource_samples import INVALID_VALUES, RULES, to_bytes, valid_resource

VALIDATOR = Validator()


class Location(NamedTuple):
    """An element of a resource: the keys to its parent object, its FHIRPath and its rule."""

    keys: tuple[str | int, ...]
    path: str
    structure: str
    element: Element
    name: str
    type: str


def list_elements(value: dict[str, Any], structure: str, keys: tuple[str | int, ...], path: str) -> Iterator[Location]:
    """Yield the location of each element in an object, at any depth."""
    for name, child in value.items():
        if name not in RULES.structure(structure).properties:
            continue
        element, type_ = RULES.structure(structure).properties[name]
        here = f"{path}.{element.name}"
        yield Location(keys, here, structure, element, name, type_)
        if type_ in PRIMITIVES:
            continue
        for n, item in enumerate(child) if element.is_list else [(None, child)]:
            step = (name,) if n is None else (name, n)
            yield from list_elements(item, type_, (*keys, *step), here if n is None else f"{here}[{n}]")


def find_parent(resource: dict[str, Any], location: Location) -> dict[str, Any]:
    parent: Any = resource
    for key in location.keys:
        parent = parent[key]
    return parent  # type: ignore[no-any-return]


def mutate(resource: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield a rule, a path and a copy of the resource that violates the rule at the path."""
    for location in list_elements(resource, resource["resourceType"], (), resource["resourceType"]):
        element, name = location.element, location.name
        value = find_parent(resource, location)[name]
        first = f"{location.path}[0]" if element.is_list else location.path
        parent_path = location.path.rpartition(".")[0]

        def changed(new: object, name: str = name, location: Location = location) -> dict[str, Any]:
            other = copy.deepcopy(resource)
            find_parent(other, location)[name] = new
            return other

        def with_first(new: object, element: Element = element, changed: Any = changed) -> dict[str, Any]:
            return changed([new] if element.is_list else new)  # type: ignore[no-any-return]

        yield "structure", f"{parent_path}.noSuchElement", changed(1, name="noSuchElement")
        yield "structure", location.path, changed(value[0] if element.is_list else [value])
        yield "structure", location.path, changed(None)
        yield "structure", location.path, changed([])
        yield "structure", first, with_first(None)
        if element.required:
            without = changed(value)
            del find_parent(without, location)[name]
            find_parent(without, location).setdefault("id", "e1")
            yield "cardinality", location.path, without
        if element.is_choice:
            other = next(n for n in element.json_names() if n != name)
            yield "cardinality", location.path, changed(True, name=other)
        if location.type not in PRIMITIVES:
            yield "structure", first, with_first({})
            yield "structure", first, with_first("text")
            if not element.required:
                yield "invariant:ele-1", first, with_first({"id": "e1"})
        else:
            for invalid in INVALID_VALUES[location.type]:
                yield "primitive", first, with_first(invalid)
            if element.value_set is not None:
                yield "required-binding", first, with_first("no such code")
        if location.type == "CodeableConcept" and element.value_set is not None:
            yield "required-binding", first, with_first({"coding": [{"system": "http://x.org", "code": "y"}]})
            yield "required-binding", first, with_first({"text": "text alone"})
        if location.type == "Reference":
            yield "reference-target", first, with_first({"reference": "no reference"})
            yield "reference-target", first, with_first({"reference": "NoSuchType/1"})
            yield "invariant:ref-1", first, with_first({"reference": "#nothing"})
            if element.targets - {"Resource"}:
                yield "reference-target", first, with_first({"reference": "Parameters/1"})
                yield "reference-target", first, with_first({"reference": "https://x.org/r4/Parameters/1/_history/2"})
                yield "reference-target", first, with_first({"type": "Parameters", "display": "x"})
    yield from mutate_resource(resource)


def mutate_resource(resource: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Like ``mutate``, for rules of the resource itself: contained resources, extensions, narrative."""
    name = resource["resourceType"]
    inner = {"resourceType": "Organization", "id": "o", "name": "x"}
    yield "invariant:dom-3", name, {**resource, "contained": [inner]}
    yield "invariant:dom-4", name, {**resource, "contained": [{**inner, "meta": {"versionId": "1"}}]}
    yield "invariant:dom-5", name, {**resource, "contained": [{**inner, "meta": {"security": [{"code": "R"}]}}]}
    yield (
        "invariant:dom-2",
        f"{name}.contained[0].contained[0]",
        {**resource, "contained": [{**inner, "contained": [inner]}]},
    )
    yield "structure", f"{name}.contained[0]", {**resource, "contained": [{"id": "o", "resourceType": "NoType"}]}
    yield "structure", f"{name}.contained[0].nope", {**resource, "contained": [{**inner, "nope": 1}]}
    yield "invariant:ext-1", f"{name}.extension[0]", {**resource, "extension": [{"url": "http://x.org"}]}
    script = '<div xmlns="http://www.w3.org/1999/xhtml"><script>x</script></div>'
    yield "invariant:txt-1", f"{name}.text.div", {**resource, "text": {"status": "generated", "div": script}}
    empty = '<div xmlns="http://www.w3.org/1999/xhtml"/>'
    yield "invariant:txt-2", f"{name}.text.div", {**resource, "text": {"status": "generated", "div": empty}}
    yield "structure", f"{name}.language", {**resource, "language": "en", "_language": None}
    without = {key: value for key, value in resource.items() if key != "implicitRules"}
    yield "invariant:ele-1", f"{name}.implicitRules", {**without, "_implicitRules": {"id": "a"}}


@pytest.mark.parametrize("resource_type", [t.name for t in CATALOG])
def test_each_violated_rule_is_reported_at_its_path(resource_type: str) -> None:
    missed = []
    count = 0
    for rule, path, resource in mutate(valid_resource(resource_type)):
        issues = VALIDATOR.check(to_bytes(resource)).issues
        count += 1
        if (rule, path) not in {(issue.rule, issue.path) for issue in issues}:
            missed.append((rule, path, [(i.rule, i.path) for i in issues]))
    assert not missed
    assert count > 40


def test_all_issues_are_reported_not_only_the_first() -> None:
    body = b'{"resourceType":"Patient","gender":"x","birthDate":"y","foo":1,"contact":[{"gender":"z"}]}'
    assert [(i.rule, i.path) for i in VALIDATOR.check(body).issues] == [
        ("required-binding", "Patient.gender"),
        ("primitive", "Patient.birthDate"),
        ("structure", "Patient.foo"),
        ("required-binding", "Patient.contact[0].gender"),
        ("invariant:pat-1", "Patient.contact[0]"),
    ]
