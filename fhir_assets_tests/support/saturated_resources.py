"""Resources that say everything: made from the model of R4, so that no element and no type of a choice is missed."""

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
TURNS = 24


def saturated(type_name: str, turn: int, literals: Mapping[str, object], depth: int = 0) -> Resource:
    """An object in which each element is there, and twice where it may repeat. ``turn`` picks the type of a choice
    and the target of a reference, ``literals`` the value of elements on which a view looks. A string says where it
    stands, as ``HumanName.family``."""
    made: Resource = {}
    for element in r4().types[type_name].elements.values():
        if element.name == "id" or element.types[0] in {"Extension", "Narrative", "Resource"}:
            continue
        names = element.json_names()
        json_name, type_ = names[turn % len(names)]
        value = fill(f"{type_name}.{element.name}", type_, element, turn // len(names), literals, depth)
        if value is not None:
            made[json_name] = [value, value] if element.many else value
    return made


def fill(path: str, type_: str, element: Element, turn: int, literals: Mapping[str, object], depth: int) -> object:
    if r4().is_primitive(type_):
        return literals.get(element.name) or PRIMITIVES.get(type_, path)
    if type_ == "Reference":
        targets = element.targets or tuple(BY_NAME)
        return {"reference": f"{targets[turn % len(targets)]}/{path}", "display": "Reference.display"}
    return saturated(type_, turn, literals, depth + 1) if depth < 6 else None


def saturated_resources(resource_type: str) -> Iterator[Resource]:
    """Enough saturated resources for each type of a choice and each target of a reference to have its turn."""
    for turn in range(TURNS):
        yield {**saturated(resource_type, turn, {}), "resourceType": resource_type, "id": "a"}
