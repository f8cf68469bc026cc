"""The functions of FHIRPath and FHIR, each by what it needs and what it gives.

A function of single values is a row of ``SCALARS``, one of whole collections a row of ``COLLECTIONS``. Those that
take criteria, types or no input at all are with the resolver.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fhir_assets.fhir.path import equality, moments, runtime, scalars
from fhir_assets.fhir.path.nodes import Types
from fhir_assets.fhir.path.steps import Template

_BOOLEAN: Types = frozenset({"boolean"})
_INTEGER: Types = frozenset({"integer"})
_DECIMAL: Types = frozenset({"decimal"})
_STRING: Types = frozenset({"string"})
SAME: Types = frozenset({"same as the input"})
"""The function gives values of the type of its input."""


@dataclass(frozen=True, slots=True)
class Function:
    """``least`` and ``most`` count the arguments; ``many`` says that the result is a collection; ``takes`` is the kind
    of its input, if it takes only one.
    """

    template: Template
    types: Types
    least: int = 0
    most: int = 0
    many: bool = False
    takes: str | None = None


SCALARS: dict[str, Function] = {
    "indexOf": Function("{0}.find({1})", _INTEGER, 1, 1, takes="text"),
    "substring": Function(scalars.substring, _STRING, 1, 2, takes="text"),
    "startsWith": Function("{0}.startswith({1})", _BOOLEAN, 1, 1, takes="text"),
    "endsWith": Function("{0}.endswith({1})", _BOOLEAN, 1, 1, takes="text"),
    "contains": Function("{1} in {0}", _BOOLEAN, 1, 1, takes="text"),
    "upper": Function("{0}.upper()", _STRING, takes="text"),
    "lower": Function("{0}.lower()", _STRING, takes="text"),
    "trim": Function("{0}.strip()", _STRING, takes="text"),
    "replace": Function("{0}.replace({1}, {2})", _STRING, 2, 2, takes="text"),
    "matches": Function(scalars.matches, _BOOLEAN, 1, 1, takes="text"),
    "matchesFull": Function(scalars.matches_full, _BOOLEAN, 1, 1, takes="text"),
    "replaceMatches": Function(scalars.replace_matches, _STRING, 2, 2, takes="text"),
    "length": Function("len({0})", _INTEGER, takes="text"),
    "toChars": Function("list({0})", _STRING, many=True, takes="text"),
    "split": Function("{0}.split({1})", _STRING, 1, 1, many=True, takes="text"),
    "encode": Function(scalars.encode, _STRING, 1, 1, takes="text"),
    "decode": Function(scalars.decode, _STRING, 1, 1, takes="text"),
    "escape": Function(scalars.escape, _STRING, 1, 1, takes="text"),
    "toString": Function(scalars.to_string, _STRING),
    "toInteger": Function(scalars.to_integer, _INTEGER),
    "toDecimal": Function(scalars.to_decimal, _DECIMAL),
    "toBoolean": Function(scalars.to_boolean, _BOOLEAN),
    "toDate": Function(scalars.to_date, frozenset({"date"})),
    "toDateTime": Function(scalars.to_date_time, frozenset({"dateTime"})),
    "toTime": Function(scalars.to_time, frozenset({"time"})),
    "abs": Function(scalars.absolute, SAME, takes="number"),
    "ceiling": Function(scalars.ceiling, _INTEGER, takes="number"),
    "floor": Function(scalars.floor, _INTEGER, takes="number"),
    "truncate": Function(scalars.truncate, _INTEGER, takes="number"),
    "round": Function(scalars.round_, _DECIMAL, 0, 1, takes="number"),
    "sqrt": Function(scalars.sqrt, _DECIMAL, takes="number"),
    "exp": Function(scalars.exp, _DECIMAL, takes="number"),
    "ln": Function(scalars.ln, _DECIMAL, takes="number"),
    "log": Function(scalars.log, _DECIMAL, 1, 1, takes="number"),
    "power": Function(scalars.power, SAME, 1, 1, takes="number"),
    "comparable": Function(scalars.comparable, _BOOLEAN, 1, 1),
    "getResourceKey": Function(runtime.resource_key, _STRING),
    "getValue": Function("{0}", SAME),
}
SCALARS |= {
    f"convertsTo{name}": Function(scalars.converts(SCALARS[f"to{name}"].template), _BOOLEAN)
    for name in ("String", "Integer", "Decimal", "Boolean", "Date", "DateTime", "Time")
}

COLLECTIONS: dict[str, Function] = {
    "distinct": Function(equality.distinct, SAME, many=True),
    "isDistinct": Function(runtime.is_distinct, _BOOLEAN),
    "subsetOf": Function(runtime.subset, _BOOLEAN, 1, 1),
    "supersetOf": Function(runtime.superset, _BOOLEAN, 1, 1),
    "intersect": Function(runtime.intersect, SAME, 1, 1, many=True),
    "exclude": Function(runtime.exclude, SAME, 1, 1, many=True),
    "combine": Function("[*{0}, *{1}]", SAME, 1, 1, many=True),
    "children": Function(runtime.children, None, many=True),
    "single": Function(runtime.only, SAME),
    "allTrue": Function("all(v is True for v in {0})", _BOOLEAN),
    "anyTrue": Function("any(v is True for v in {0})", _BOOLEAN),
    "allFalse": Function("all(v is False for v in {0})", _BOOLEAN),
    "anyFalse": Function("any(v is False for v in {0})", _BOOLEAN),
}

BOUNDARIES: dict[str, Callable[..., object]] = {
    "date": moments.date_boundary,
    "dateTime": moments.date_time_boundary,
    "instant": moments.date_time_boundary,
    "time": moments.time_boundary,
    "decimal": moments.decimal_boundary,
    "integer": moments.decimal_boundary,
}

VALUES: dict[str, Function] = {
    "now": Function(scalars.now, frozenset({"dateTime"})),
    "today": Function(scalars.today, frozenset({"date"})),
    "timeOfDay": Function(scalars.time_of_day, frozenset({"time"})),
}
