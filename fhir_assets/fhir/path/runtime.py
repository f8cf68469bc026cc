"""Runtime support for generated code: collections, choice elements, references and tree traversal."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cache
from typing import Any

from fhir_assets.errors import FhirPathError
from fhir_assets.fhir.model import r4
from fhir_assets.fhir.path.equality import key
from fhir_assets.fhir.references import Bases, split_reference

JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "boolean": (bool,),
    "integer": (int,),
    "decimal": (int, float, Decimal),
}
"""The Python types of parsed JSON for primitive FHIR types; all other primitive types are strings."""


NOT_FHIR = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""The errors that generated code may raise on a resource whose elements do not have the types that R4 defines."""


def only(items: Sequence[Any]) -> Any:
    """Return the only item, or None if there is none. Raises FhirPathError if there are several."""
    if len(items) > 1:
        raise FhirPathError("several values where one is allowed")
    return items[0] if items else None


def at(items: Sequence[Any] | None, index: int | None) -> Any:
    """Return the item at an index, or None."""
    return items[index] if items and index is not None and 0 <= index < len(items) else None


@cache
def _interned(names: frozenset[str]) -> frozenset[str]:
    return names


def name_set(names: Iterable[str]) -> frozenset[str]:
    """Return one shared set for equal names, so that generated code binds it once."""
    return _interned(frozenset(names))


def get_choice(parent: Mapping[str, Any], names: frozenset[str]) -> Any:
    """Return the value of a choice element (``value[x]``), whose JSON names are given; None if it is absent."""
    for name in parent:
        if name in names:
            return parent[name]
    return None


def pad_primitives(values: Sequence[Any] | None, extras: Sequence[Any] | None) -> Sequence[Any]:
    """Return the items of an array of primitives, with None for each item that has only extensions."""
    if not extras:
        return values or ()
    values = values or ()
    return [*values, *[None] * (len(extras) - len(values))]


def resource_in(item: Any, types: frozenset[str]) -> bool:
    """Return True if the item is a resource of one of the types."""
    return type(item) is dict and item.get("resourceType") in types


def members(parent: Any, name: str) -> Iterator[Any]:
    """Yield the values of an element in an object of unknown type.

    A choice element (``value[x]``) matches by its name without the type.
    """
    if type(parent) is not dict:
        return
    element = parent.get(name)
    if element is None:
        for key_, value in parent.items():
            if key_.startswith(name) and key_[len(name) : len(name) + 1].isupper():
                element = value
                break
    for item in element if type(element) is list else (element,):
        if item is not None:
            yield item


def children(items: Iterable[Any]) -> list[Any]:
    """Return all immediate children. A primitive that has only extensions is represented by its ``_name`` object."""
    result: list[Any] = []
    for item in items:
        if type(item) is not dict:
            continue
        for name, value in item.items():
            if name == "resourceType" or (name[0] == "_" and name[1:] in item):
                continue
            result.extend([v for v in value if v is not None] if type(value) is list else (value,))
    return result


def descendants(items: Iterable[Any]) -> list[Any]:
    """Return the children, their children, and so on, level by level."""
    result: list[Any] = []
    level = children(items)
    while level:
        result += level
        level = children(level)
    return result


def descendants_of(items: Iterable[Any], type_name: str, wanted: str) -> list[Any]:
    """Return the descendants of the wanted type. ``type_name`` is the type of the items, if they are not resources."""
    model = r4()
    result: list[Any] = []

    def walk(item: dict[str, Any], item_type: str) -> None:
        type_ = model.types.get(item.get("resourceType", item_type))
        for name, value in item.items() if type_ else ():
            element = type_.json.get(name) if type_ else None
            if element is None:
                continue
            for child in value if type(value) is list else (value,):
                child_type = child.get("resourceType", element[1]) if type(child) is dict else element[1]
                if child is not None and model.is_a(child_type, wanted):
                    result.append(child)
                if type(child) is dict:
                    walk(child, child_type)

    for item in items:
        walk(item, type_name)
    return result


class Seen:
    """A set of FHIRPath values, compared with ``=``."""

    def __init__(self) -> None:
        self._keys: set[object] = set()

    def add(self, value: Any) -> bool:
        """Add a value; return True if it is new."""
        value_key = key(value)
        if value_key in self._keys:
            return False
        self._keys.add(value_key)
        return True


def subset(items: Sequence[Any], others: Sequence[Any]) -> bool:
    """Return True if each item is among the others."""
    known = {key(other) for other in others}
    return all(key(item) in known for item in items)


def superset(items: Sequence[Any], others: Sequence[Any]) -> bool:
    """Return True if each of the others is among the items."""
    return subset(others, items)


def intersect(items: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Return the items that are among the others, each distinct item once."""
    known, seen = {key(other) for other in others}, Seen()
    return [item for item in items if key(item) in known and seen.add(item)]


def exclude(items: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Return the items that are not among the others."""
    known = {key(other) for other in others}
    return [item for item in items if key(item) not in known]


def is_distinct(items: Sequence[Any]) -> bool:
    """Return True if all items are distinct."""
    return len({key(item) for item in items}) == len(items)


def resource_key(resource: Any) -> str | None:
    """Return the ``id`` of a resource (``getResourceKey()``). It equals the key of a reference to it."""
    return resource.get("id") if type(resource) is dict and "resourceType" in resource else None


def build_reference_key(wanted: str | None, bases: Bases) -> Callable[[Mapping[str, Any]], str | None]:
    """Return the function ``getReferenceKey(wanted)`` for sources with these base URLs.

    The key is the id in a literal reference of type ``wanted`` (None: any): ``Type/id``, or ``base/Type/id`` with one
    of the bases, each with or without ``/_history/version``. Any other reference has no key: it refers to another
    server (absolute, ``urn:…``), to a resource by its identifier (``Type?identifier=…``), or to a contained resource
    (``#id``), which has no row.
    """
    start = f"{wanted}/" if wanted else None

    def reference_key(reference: Mapping[str, Any]) -> str | None:
        literal = reference.get("reference")
        if type(literal) is not str:
            return None
        if start and literal.startswith(start) and literal.isascii() and "?" not in literal:
            rest = literal[len(start) :]
            if "/" not in rest:
                return rest or None
        target = split_reference(literal, bases)
        return target[1] if target and (wanted is None or target[0] == wanted) else None

    return reference_key


def resolve(references: Iterable[Any], resource: Mapping[str, Any]) -> list[Any]:
    """Resolve references without access to other resources (``resolve()``).

    A reference to a contained resource gives that resource; any other reference gives an object with the
    ``resourceType`` and the ``id`` only. References to unknown types are skipped.
    """
    targets: list[Any] = []
    for reference in references:
        literal = reference.get("reference") if type(reference) is dict else reference
        if type(literal) is not str:
            continue
        if literal.startswith("#"):
            targets += [item for item in resource.get("contained", ()) if item.get("id") == literal[1:]]
            continue
        parts = literal.split("/_history/", 1)[0].split("/")
        if len(parts) > 1 and parts[-2] in r4().types:
            targets.append({"resourceType": parts[-2], "id": parts[-1]})
    return targets
