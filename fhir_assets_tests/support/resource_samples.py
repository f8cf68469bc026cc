"""Random resources that conform to the structure of the rules, and valid and invalid values of primitive types."""

import json
from random import Random
from typing import Any

from fhir_assets.fhir.validation import Validator
from fhir_assets.fhir.validation.bindings import GRAMMARS
from fhir_assets.fhir.validation.rules import PRIMITIVES, Element, load_rules

RULES = load_rules()

VALID_VALUES: dict[str, list[Any]] = {
    "Element.id": ["e1"],
    "base64Binary": ["aGVsbG8="],
    "boolean": [True, False],
    "canonical": ["http://example.org/canonical|1"],
    "code": ["a-code", "two words"],
    "date": ["2024-02-29", "2024-01", "2024"],
    "dateTime": ["2024-01-31T10:00:00+01:00", "2024-01-31T10:00:00.123Z", "2023-12-31", "2023"],
    "decimal": [0, 1.5, -2, 1e3],
    "id": ["an-id.1"],
    "instant": ["2024-01-31T10:00:00Z", "2024-02-29T23:59:60.5-14:00"],
    "integer": [-1, 0, 2147483647],
    "markdown": ["*text*\n"],
    "oid": ["urn:oid:1.2.3"],
    "positiveInt": [1, 3],
    "string": ["text", 'é:{}[]"\\'],
    "time": ["10:00:00"],
    "unsignedInt": [0, 2],
    "uri": ["http://example.org/x", "http://unitsofmeasure.org"],
    "url": ["http://example.org/x"],
    "uuid": ["urn:uuid:53fefa32-fcbb-4ff8-8a92-55ee120877b7"],
    "xhtml": ['<div xmlns="http://www.w3.org/1999/xhtml"><p>text</p></div>'],
}

INVALID_VALUES: dict[str, list[Any]] = {
    "Element.id": ["a b", ""],
    "base64Binary": ["a", "====", "aGVsbG8", ""],
    "boolean": ["true", 1, ""],
    "canonical": ["http://a b", ""],
    "code": [" a", "a ", "a  b", "a\tb", ""],
    "date": ["2023-02-29", "2024-13", "24", "2024-1-1", "2024-01-01T00:00:00Z", "0000", ""],
    "dateTime": ["2024-02-30", "2024-01-01T10:00:00", "2024-01-01T10:00Z", "2024-01-01T24:00:00Z", ""],
    "decimal": ["1", True, ""],
    "id": ["a b", "a" * 65, "a_b", "é", ""],
    "instant": ["2024-01-01", "2024-01-01T10:00:00", "2024-01-01T10:00:00+15:00", ""],
    "integer": ["1", 1.5, 2147483648, -2147483649, True],
    "markdown": ["", "\x00"],
    "oid": ["1.2.3", "urn:oid:3.1", ""],
    "positiveInt": [0, -1, "1"],
    "string": ["", "\x01", 1, True],
    "time": ["10:00", "25:00:00", ""],
    "unsignedInt": [-1, "0"],
    "uri": ["a b", "", "a\n"],
    "url": ["a b", ""],
    "uuid": ["53fefa32-fcbb-4ff8-8a92-55ee120877b7", "urn:uuid:53FEFA32-fcbb-4ff8-8a92-55ee120877b7", ""],
    "xhtml": ["text", "<div>no namespace</div>", '<div xmlns="http://www.w3.org/1999/xhtml"><p></div>'],
}  # fmt: skip


class Sampler:
    """Generates values of R4 types. ``share`` is the probability that an optional element is present."""

    def __init__(self, random: Random, share: float) -> None:
        self.random = random
        self.share = share

    def resource(self, resource_type: str) -> dict[str, Any]:
        """Return a resource of the type."""
        return {"resourceType": resource_type, **self.complex(resource_type, 0)}

    def complex(self, type_: str, depth: int) -> dict[str, Any]:
        """Return a value of a complex type or structure."""
        value: dict[str, Any] = {}
        share = self.share / (1 + depth)
        structure = RULES.structure(type_)
        for element in structure.elements.values():
            present = element.required or (self.random.random() < share and depth < 6)
            if not present or element.name in {"contained", "id"} or "Resource" in element.types:
                continue
            name, json_type = self.random.choice(list(element.json_names().items()))
            value[name] = self.items(element, json_type, depth)
        if "extension" in value and type_ == "Extension":
            value = {"url": value["url"], "valueString": "text"}
        if not value or (type_ == "Extension" and len(value) == 1):
            value.update(self.filler(type_, depth))
        return value

    def filler(self, type_: str, depth: int) -> dict[str, Any]:
        """Return one element for an object that must not be empty, a primitive element if there is one."""
        if type_ == "Extension":
            return {"valueString": "text"}
        elements = [
            e for e in RULES.structure(type_).elements.values() if e.name not in {"id", "extension", "contained"}
        ]
        element = next((e for e in elements if set(e.types) & PRIMITIVES), elements[-1])
        name, json_type = next(((n, t) for n, t in element.json_names().items()))
        return {name: self.items(element, json_type, depth)}

    def items(self, element: Element, type_: str, depth: int) -> Any:
        """Return the JSON value of an element: a list if the element repeats."""
        if not element.is_list:
            return self.item(element, type_, depth)
        return [self.item(element, type_, depth) for _ in range(self.random.choice([1, 1, 2]))]

    def item(self, element: Element, type_: str, depth: int) -> Any:
        """Return a single value of an element."""
        if element.value_set is not None:
            systems = RULES.value_sets[element.value_set]
            if systems is None:
                system = GRAMMARS[element.value_set][0]
                code = {
                    "urn:ietf:bcp:13": "text/plain",
                    "urn:iso:std:iso:4217": "EUR",
                    "http://loinc.org": "LA1-2",
                }.get(system, "mg")
            else:
                system = self.random.choice([s for s in sorted(systems) if systems[s]])
                code = self.random.choice(sorted(systems[system]))
            return code if type_ == "code" else {"coding": [{"system": system, "code": code}]}
        if type_ in PRIMITIVES:
            return self.random.choice(VALID_VALUES[type_])
        if type_ == "Reference":
            return {"reference": f"{self.random.choice(sorted(element.targets) or ['Patient'])}/1"}
        return self.complex(type_, depth + 1)


def to_bytes(resource: object) -> bytes:
    """Encode a resource as JSON; lone surrogates are kept."""
    return json.dumps(resource, ensure_ascii=False).encode("utf-8", "surrogatepass")


def valid_resource(resource_type: str, share: float = 0.5) -> dict[str, Any]:
    """Return a resource of the type without issues, with as many elements as the invariants permit."""
    validator = Validator()
    for seed in range(400):
        resource = Sampler(Random(seed), share * (1 - seed / 400)).resource(resource_type)
        if not validator.check(to_bytes(resource)).issues:
            return resource
    raise AssertionError(f"no valid {resource_type} found")


def list_locations(value: Any) -> list[tuple[Any, Any]]:
    """Return each object and array inside a JSON value with each of its keys or indexes."""
    locations: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        container = pending.pop()
        for key in list(container) if isinstance(container, dict) else range(len(container)):
            locations.append((container, key))
            if isinstance(container[key], (dict, list)):
                pending.append(container[key])
    return locations
