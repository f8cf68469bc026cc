"""Saturated resources, built from the model of R4: they contain every element and every type of a choice."""

from collections.abc import Iterator, Mapping
from typing import Any

from fhir_assets.catalog import BY_NAME
from fhir_assets.fhir.model import Element, r4

Resource = dict[str, Any]

PRIMITIVES: dict[str, object] = {
    "boolean": True,
    "integer": 1,
    "positiveInt": 1,
    "unsignedInt": 1,
    "decimal": 1.5,
    "date": "2020-02-03",
    "dateTime": "2020-02-03T04:05:06Z",
    "instant": "2020-02-03T04:05:06Z",
    "time": "04:05:06",
}
VARIANTS = 24


def saturated(type_name: str, variant: int, literals: Mapping[str, object], depth: int = 0) -> Resource:
    """Return an object with a value for each element, and two for elements that repeat.

    ``variant`` selects the type of a choice and the target of a reference; ``literals`` are values by element name. Any
    other string is its own path, such as ``HumanName.family``.
    """
    resource: Resource = {}
    for element in r4().types[type_name].elements.values():
        if element.name == "id" or element.types[0] in {"Extension", "Narrative", "Resource"}:
            continue
        names = element.json_names()
        json_name, type_ = names[variant % len(names)]
        value = element_value(f"{type_name}.{element.name}", type_, element, variant // len(names), literals, depth)
        if value is not None:
            resource[json_name] = [value, value] if element.many else value
    return resource


def element_value(
    path: str, type_: str, element: Element, variant: int, literals: Mapping[str, object], depth: int
) -> object:
    """Return the value of an element of a type, None if it is nested too deeply."""
    if r4().is_primitive(type_):
        return literals.get(element.name) or PRIMITIVES.get(type_, path)
    if type_ == "Reference":
        targets = element.targets or tuple(BY_NAME)
        return {"reference": f"{targets[variant % len(targets)]}/{path}", "display": "Reference.display"}
    return saturated(type_, variant, literals, depth + 1) if depth < 6 else None


def saturated_resources(resource_type: str) -> Iterator[Resource]:
    """Yield enough saturated resources to contain each type of a choice and each target of a reference."""
    for variant in range(VARIANTS):
        yield {**saturated(resource_type, variant, {}), "resourceType": resource_type, "id": "a"}
