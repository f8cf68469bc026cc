"""Equality, equivalence and order of values as JSON holds them (FHIRPath sections 6.1 and 6.2)."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from decimal import Decimal
from typing import Any

from fhir_assets.errors import FhirPathError

Number = int | float | Decimal


def exact(value: Number) -> Decimal:
    """A number with the digits that were written."""
    return value if type(value) is Decimal else Decimal(repr(value) if type(value) is float else value)


def is_number(value: object) -> bool:
    """True for a JSON number; Python's bool is none."""
    return type(value) in (int, float, Decimal)


def is_quantity(value: object) -> bool:
    """True for what looks like a Quantity."""
    return type(value) is dict and "value" in value and value.keys() <= _QUANTITY


_QUANTITY = {"id", "extension", "value", "comparator", "unit", "system", "code", "_value", "_unit"}


def _unit(quantity: dict[str, Any]) -> object:
    return quantity.get("code") or quantity.get("unit") or "1"


def equal(left: Any, right: Any) -> bool | None:
    """Whether two values are the same; None if their units cannot be compared."""
    if is_number(left) and is_number(right):
        return left == right or exact(left) == exact(right)
    if type(left) is not type(right):
        return False
    if is_quantity(left) and is_quantity(right):
        return exact(left["value"]) == exact(right["value"]) if _unit(left) == _unit(right) else None
    return key(left) == key(right)


def key(value: Any) -> Hashable:
    """What equal values have in common."""
    if type(value) is dict:
        return ("{}", frozenset((name, key(item)) for name, item in value.items() if name != "id"))
    if type(value) is list:
        return ("[]", tuple(key(item) for item in value))
    if type(value) is float:
        return exact(value)
    return ("bool", value) if type(value) is bool else value


def equal_lists(
    left: Sequence[Any], right: Sequence[Any], compare: Callable[[Any, Any], bool | None] = equal
) -> bool | None:
    """Item by item, in order; None if one is empty or a pair cannot be compared."""
    if not left or not right:
        return None
    if len(left) != len(right):
        return False
    results = [compare(*pair) for pair in zip(left, right, strict=True)]
    return False if False in results else None if None in results else True


def equivalent(left: Any, right: Any) -> bool:
    """``~`` of two values: case and white space of text, and digits beyond the shorter decimal, do not count."""
    if type(left) is str and type(right) is str:
        return " ".join(left.split()).lower() == " ".join(right.split()).lower()
    if is_number(left) and is_number(right):
        a, b = exact(left), exact(right)
        places = min(-int(n.as_tuple().exponent) for n in (a, b))
        return round(a, max(places, 0)) == round(b, max(places, 0))
    if type(left) is dict and type(right) is dict:
        return left.keys() - {"id"} == right.keys() - {"id"} and all(
            equivalent(value, right[name]) for name, value in left.items() if name != "id"
        )
    if type(left) is list and type(right) is list:
        return equivalent_lists(left, right)
    return equal(left, right) is True


def equivalent_lists(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """``~``: the same items in any order."""
    rest = list(right)
    if len(left) != len(rest):
        return False
    for item in left:
        found = next((n for n, other in enumerate(rest) if equivalent(item, other)), None)
        if found is None:
            return False
        del rest[found]
    return True


def order(left: Any, right: Any) -> int | None:
    """Negative, 0 or positive; None for quantities of different units. Raises FhirPathError if there is no order."""
    if is_number(left) and is_number(right):
        a, b = exact(left), exact(right)
        return (a > b) - (a < b)
    if type(left) is str and type(right) is str:
        return (left > right) - (left < right)
    if type(left) is dict and type(right) is dict:
        if "value" not in left or "value" not in right or _unit(left) != _unit(right):
            return None
        return order(left["value"], right["value"])
    raise FhirPathError("values of different types have no order: compare values of one type")


def contains(items: Iterable[Any], wanted: Any) -> bool:
    """Whether an item equals the wanted value."""
    return any(equal(item, wanted) is True for item in items)


def distinct(items: Iterable[Any]) -> list[Any]:
    """Each value once, in the order of their first appearance."""
    found: dict[Hashable, Any] = {}
    for item in items:
        found.setdefault(key(item), item)
    return list(found.values())
