"""What generated code calls to reach into a resource: collections, choices, references, trees."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cache
from typing import Any

from fhir_assets.errors import FhirPathError
from fhir_assets.fhir.model import r4
from fhir_assets.fhir.path.equality import key

JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "boolean": (bool,),
    "integer": (int,),
    "decimal": (int, float, Decimal),
}
"""What holds a primitive in parsed JSON; all others are strings."""


NOT_FHIR = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What generated code raises on a resource whose elements are not of the types that R4 gives them."""


def only(items: Sequence[Any]) -> Any:
    """The one item, or None. Raises FhirPathError if there are several."""
    if len(items) > 1:
        raise FhirPathError("several values where one is allowed")
    return items[0] if items else None


def at(items: Sequence[Any] | None, index: int | None) -> Any:
    """The item at an index, or None."""
    return items[index] if items and index is not None and 0 <= index < len(items) else None


@cache
def _interned(names: frozenset[str]) -> frozenset[str]:
    return names


def name_set(names: Iterable[str]) -> frozenset[str]:
    """The same object for the same names, so that generated code holds it once."""
    return _interned(frozenset(names))


def choice(parent: Mapping[str, Any], names: frozenset[str]) -> Any:
    """The value of a choice element: under whichever of its names it is."""
    for name in parent:
        if name in names:
            return parent[name]
    return None


def nodes(values: Sequence[Any] | None, extras: Sequence[Any] | None) -> Sequence[Any]:
    """The items of an array of primitives; None for each that has only extensions."""
    if not extras:
        return values or ()
    values = values or ()
    return [*values, *[None] * (len(extras) - len(values))]


def resource_in(item: Any, types: frozenset[str]) -> bool:
    """Whether the item is a resource of one of the types."""
    return type(item) is dict and item.get("resourceType") in types


def members(parent: Any, name: str) -> Iterator[Any]:
    """The elements of a name in an object of unknown type, a choice by its first part."""
    if type(parent) is not dict:
        return
    found = parent.get(name)
    if found is None:
        for key_, value in parent.items():
            if key_.startswith(name) and key_[len(name) : len(name) + 1].isupper():
                found = value
                break
    for item in found if type(found) is list else (found,):
        if item is not None:
            yield item


def children(items: Iterable[Any]) -> list[Any]:
    """All immediate children; a primitive that has only extensions is represented by them."""
    found: list[Any] = []
    for item in items:
        if type(item) is not dict:
            continue
        for name, value in item.items():
            if name == "resourceType" or (name[0] == "_" and name[1:] in item):
                continue
            found.extend([v for v in value if v is not None] if type(value) is list else (value,))
    return found


def descendants(items: Iterable[Any]) -> list[Any]:
    """The children, their children, and so on; parents come first."""
    found: list[Any] = []
    level = children(items)
    while level:
        found += level
        level = children(level)
    return found


def descendants_of(items: Iterable[Any], type_name: str, wanted: str) -> list[Any]:
    """The descendants of one type, found by following the types of the elements."""
    model = r4()
    found: list[Any] = []

    def walk(item: dict[str, Any], at: str) -> None:
        type_ = model.types.get(item.get("resourceType", at))
        for name, value in item.items() if type_ else ():
            element = type_.json.get(name) if type_ else None
            if element is None:
                continue
            for each in value if type(value) is list else (value,):
                child = each.get("resourceType", element[1]) if type(each) is dict else element[1]
                if each is not None and model.is_a(child, wanted):
                    found.append(each)
                if type(each) is dict:
                    walk(each, child)

    for item in items:
        walk(item, type_name)
    return found


class Seen:
    """Values met so far."""

    def __init__(self) -> None:
        self._keys: set[object] = set()

    def add(self, value: Any) -> bool:
        """True if the value is new."""
        found = key(value)
        if found in self._keys:
            return False
        self._keys.add(found)
        return True


def subset(items: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether each item is among the others."""
    known = {key(other) for other in others}
    return all(key(item) in known for item in items)


def superset(items: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether each of the others is among the items."""
    return subset(others, items)


def intersect(items: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The items that are among the others, each once."""
    known, seen = {key(other) for other in others}, Seen()
    return [item for item in items if key(item) in known and seen.add(item)]


def exclude(items: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The items that are not among the others."""
    known = {key(other) for other in others}
    return [item for item in items if key(item) not in known]


def is_distinct(items: Sequence[Any]) -> bool:
    """Whether no item comes twice."""
    return len({key(item) for item in items}) == len(items)


def resource_key(resource: Any) -> str | None:
    """The ``id`` of a resource: what ``getReferenceKey()`` of a reference to it gives."""
    return resource.get("id") if type(resource) is dict and "resourceType" in resource else None


def reference_key(reference: Mapping[str, Any], wanted: str | None = None) -> str | None:
    """The id that a literal reference names, if it names a resource of the wanted type.

    ``Type/id``, ``http://server/Type/id``, each with or without ``/_history/version``. A ``urn:uuid:`` or
    ``urn:oid:`` gives the whole urn, if ``type`` says the wanted type or none is wanted: it names the resource as it
    was before a server gave it an id. A contained resource (``#id``) has no row of its own, so it gives nothing.
    """
    literal = reference.get("reference")
    if type(literal) is not str or literal.startswith("#"):
        return None
    if literal.startswith("urn:"):
        return literal if wanted is None or reference.get("type") == wanted else None
    parts = literal.split("/_history/", 1)[0].split("/")
    if len(parts) < 2 or not parts[-1]:
        return None
    return parts[-1] if wanted is None or parts[-2] == wanted else None


def resolve(references: Iterable[Any], resource: Mapping[str, Any]) -> list[Any]:
    """What references point to, without leaving the resource: a contained resource whole, any other resource as its
    type and id. References of unknown types are skipped.
    """
    found: list[Any] = []
    for reference in references:
        literal = reference.get("reference") if type(reference) is dict else reference
        if type(literal) is not str:
            continue
        if literal.startswith("#"):
            found += [each for each in resource.get("contained", ()) if each.get("id") == literal[1:]]
            continue
        parts = literal.split("/_history/", 1)[0].split("/")
        if len(parts) > 1 and parts[-2] in r4().types:
            found.append({"resourceType": parts[-2], "id": parts[-1]})
    return found
