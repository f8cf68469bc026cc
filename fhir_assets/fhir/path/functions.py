"""Tables of the functions of FHIRPath and FHIR, with their arguments and result types.

``SCALARS`` holds functions of single values, ``COLLECTIONS`` functions of collections, ``VALUES`` functions without
input. Functions that take criteria or types are in ``resolver``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fhir_assets.fhir.path import date_times, equality, runtime, scalar_functions
from fhir_assets.fhir.path.expressions import Types
from fhir_assets.fhir.path.invocation_expressions import Template

_BOOLEAN: Types = frozenset({"boolean"})
_INTEGER: Types = frozenset({"integer"})
_DECIMAL: Types = frozenset({"decimal"})
_STRING: Types = frozenset({"string"})
SAME: Types = frozenset({"same as the input"})
"""The marker of functions whose result has the type of their input."""


@dataclass(frozen=True, slots=True)
class Function:
    """The signature of a FHIRPath function.

    ``template`` computes the result; ``types`` are its FHIR types, None if they are not known. ``min_arguments`` and
    ``max_arguments`` limit the number of arguments. ``many`` is True if the result is a collection. ``takes`` is the
    kind of input (``text``, ``number``), None if any is allowed.
    """

    template: Template
    types: Types
    min_arguments: int = 0
    max_arguments: int = 0
    many: bool = False
    takes: str | None = None


SCALARS: dict[str, Function] = {
    "indexOf": Function("{0}.find({1})", _INTEGER, 1, 1, takes="text"),
    "substring": Function(scalar_functions.substring, _STRING, 1, 2, takes="text"),
    "startsWith": Function("{0}.startswith({1})", _BOOLEAN, 1, 1, takes="text"),
    "endsWith": Function("{0}.endswith({1})", _BOOLEAN, 1, 1, takes="text"),
    "contains": Function("{1} in {0}", _BOOLEAN, 1, 1, takes="text"),
    "upper": Function("{0}.upper()", _STRING, takes="text"),
    "lower": Function("{0}.lower()", _STRING, takes="text"),
    "trim": Function("{0}.strip()", _STRING, takes="text"),
    "replace": Function("{0}.replace({1}, {2})", _STRING, 2, 2, takes="text"),
    "matches": Function(scalar_functions.matches, _BOOLEAN, 1, 1, takes="text"),
    "matchesFull": Function(scalar_functions.matches_full, _BOOLEAN, 1, 1, takes="text"),
    "replaceMatches": Function(scalar_functions.replace_matches, _STRING, 2, 2, takes="text"),
    "length": Function("len({0})", _INTEGER, takes="text"),
    "toChars": Function("list({0})", _STRING, many=True, takes="text"),
    "split": Function("{0}.split({1})", _STRING, 1, 1, many=True, takes="text"),
    "encode": Function(scalar_functions.encode, _STRING, 1, 1, takes="text"),
    "decode": Function(scalar_functions.decode, _STRING, 1, 1, takes="text"),
    "escape": Function(scalar_functions.escape, _STRING, 1, 1, takes="text"),
    "toString": Function(scalar_functions.to_string, _STRING),
    "toInteger": Function(scalar_functions.to_integer, _INTEGER),
    "toDecimal": Function(scalar_functions.to_decimal, _DECIMAL),
    "toBoolean": Function(scalar_functions.to_boolean, _BOOLEAN),
    "toDate": Function(scalar_functions.to_date, frozenset({"date"})),
    "toDateTime": Function(scalar_functions.to_date_time, frozenset({"dateTime"})),
    "toTime": Function(scalar_functions.to_time, frozenset({"time"})),
    "abs": Function(scalar_functions.absolute, SAME, takes="number"),
    "ceiling": Function(scalar_functions.ceiling, _INTEGER, takes="number"),
    "floor": Function(scalar_functions.floor, _INTEGER, takes="number"),
    "truncate": Function(scalar_functions.truncate, _INTEGER, takes="number"),
    "round": Function(scalar_functions.round_, _DECIMAL, 0, 1, takes="number"),
    "sqrt": Function(scalar_functions.sqrt, _DECIMAL, takes="number"),
    "exp": Function(scalar_functions.exp, _DECIMAL, takes="number"),
    "ln": Function(scalar_functions.ln, _DECIMAL, takes="number"),
    "log": Function(scalar_functions.log, _DECIMAL, 1, 1, takes="number"),
    "power": Function(scalar_functions.power, SAME, 1, 1, takes="number"),
    "comparable": Function(scalar_functions.comparable, _BOOLEAN, 1, 1),
    "getResourceKey": Function(runtime.resource_key, _STRING),
    "getValue": Function("{0}", SAME),
}
SCALARS |= {
    f"convertsTo{name}": Function(scalar_functions.build_converts_to(SCALARS[f"to{name}"].template), _BOOLEAN)
    for name in ("String", "Integer", "Decimal", "Boolean", "Date", "DateTime", "Time")
}
"""The functions of single values. A template gets the input as ``{0}`` and the arguments as ``{1}``, ``{2}``. The
result is empty if an operand is empty.
"""

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
"""The functions of collections. A template gets the input collection as ``{0}``, the argument collection as ``{1}``."""

BOUNDARIES: dict[str, Callable[..., object]] = {
    "date": date_times.date_boundary,
    "dateTime": date_times.date_time_boundary,
    "instant": date_times.date_time_boundary,
    "time": date_times.time_boundary,
    "decimal": date_times.decimal_boundary,
    "integer": date_times.decimal_boundary,
}
"""The implementation of ``lowBoundary()`` and ``highBoundary()`` for each type of input."""

VALUES: dict[str, Function] = {
    "now": Function(scalar_functions.now, frozenset({"dateTime"})),
    "today": Function(scalar_functions.today, frozenset({"date"})),
    "timeOfDay": Function(scalar_functions.time_of_day, frozenset({"time"})),
}
"""The functions without input."""
