"""Equality, equivalence and order of JSON values (FHIRPath sections 6.1 and 6.2).

Dates and times compare by other rules: see ``date_times``.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from decimal import Decimal
from typing import Any

from fhir_assets.errors import FhirPathError

Number = int | float | Decimal


def exact(value: Number) -> Decimal:
    """Convert a number to a Decimal with the digits as written in JSON."""
    return value if type(value) is Decimal else Decimal(repr(value) if type(value) is float else value)


def is_number(value: object) -> bool:
    """Return True for a JSON number. A bool is not a number, although it is an int in Python."""
    return type(value) in (int, float, Decimal)


def is_quantity(value: object) -> bool:
    """Return True if the value has the elements of a Quantity."""
    return type(value) is dict and "value" in value and value.keys() <= _QUANTITY


_QUANTITY = {"id", "extension", "value", "comparator", "unit", "system", "code", "_value", "_unit"}


def _unit(quantity: dict[str, Any]) -> object:
    return quantity.get("code") or quantity.get("unit") or "1"


def equal(left: Any, right: Any) -> bool | None:
    """Compare two values with ``=``; None if both are quantities of different units."""
    if is_number(left) and is_number(right):
        return left == right or exact(left) == exact(right)
    if type(left) is not type(right):
        return False
    if is_quantity(left) and is_quantity(right):
        return exact(left["value"]) == exact(right["value"]) if _unit(left) == _unit(right) else None
    return key(left) == key(right)


def key(value: Any) -> Hashable:
    """Return a hashable key; equal values have equal keys."""
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
    """Compare two collections with ``=``, item by item in order; None if one is empty or two items are incomparable."""
    if not left or not right:
        return None
    if len(left) != len(right):
        return False
    results = [compare(*pair) for pair in zip(left, right, strict=True)]
    return False if False in results else None if None in results else True


def equivalent(left: Any, right: Any) -> bool:
    """Compare two values with ``~``.

    Strings are compared without regard to case and white space, decimals rounded to the precision of the less
    precise one.
    """
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
    """Compare two collections with ``~``: the same items in any order."""
    rest = list(right)
    if len(left) != len(rest):
        return False
    for item in left:
        match = next((n for n, other in enumerate(rest) if equivalent(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True


def order(left: Any, right: Any) -> int | None:
    """Return a negative number, 0 or a positive number as ``left`` is less than, equal to or greater than ``right``.

    Returns None for quantities of different units. Raises FhirPathError if the types have no order.
    """
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
    """Return True if an item equals the wanted value."""
    return any(equal(item, wanted) is True for item in items)


def distinct(items: Iterable[Any]) -> list[Any]:
    """Return each value once, in the order of first occurrence."""
    by_key: dict[Hashable, Any] = {}
    for item in items:
        by_key.setdefault(key(item), item)
    return list(by_key.values())
