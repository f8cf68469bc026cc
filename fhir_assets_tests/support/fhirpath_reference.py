"""Reference evaluators for comparison: fhirpathpy for paths, and a simple interpreter of ViewDefinitions."""

import copy
from collections.abc import Iterator
from decimal import Decimal
from itertools import product
from typing import Any

import fhirpathpy
from fhirpathpy.models import models

from fhir_assets.fhir.model import r4

Row = dict[str, Any]


def normalize(value: Any) -> Any:
    """Convert a value so that equal numbers and dates of different evaluators compare equal."""
    if isinstance(value, list):
        return [normalize(item) for item in value]
    if isinstance(value, dict):
        return {name: normalize(item) for name, item in value.items()}
    if isinstance(value, float | Decimal):
        return float(value)
    return str(value) if type(value).__name__.startswith("FP_") else value


def evaluate(focus: Any, path: str, type_: str) -> list[Any]:
    """Evaluate a path with fhirpathpy on a focus of a type."""
    expression: Any = path if r4().types[type_].kind == "resource" else {"base": type_, "expression": path}
    values: list[Any] = normalize(fhirpathpy.evaluate(copy.deepcopy(focus), expression, {}, models["r4"]))
    return values


def compute_view_rows(view: dict[str, Any], resource: dict[str, Any], types: dict[str, str]) -> list[Row]:
    """Return the rows of a view whose columns are all collections.

    ``types`` has the type of each ``forEach`` path.
    """
    root = view["resource"]
    for where in view.get("where", ()):
        if evaluate(resource, where["path"], root) != [True]:
            return []
    return _product(view["select"], resource, root, types)


def _product(selects: list[dict[str, Any]], focus: Any, type_: str, types: dict[str, str]) -> list[Row]:
    parts = [list(_select(select, focus, type_, types)) for select in selects]
    return [{name: value for part in row for name, value in part.items()} for row in product(*parts)]


def _select(select: dict[str, Any], focus: Any, type_: str, types: dict[str, str]) -> Iterator[Row]:
    over = select.get("forEach") or select.get("forEachOrNull")
    if over is None:
        yield from _contents(select, focus, type_, types)
        return
    items = evaluate(focus, over, type_)
    for item in items:
        yield from _contents(select, item, types[over], types)
    if not items and "forEachOrNull" in select:
        yield dict.fromkeys(_names(select))


def _contents(select: dict[str, Any], focus: Any, type_: str, types: dict[str, str]) -> list[Row]:
    own = [{column["name"]: evaluate(focus, column["path"], type_) for column in select.get("column", ())}]
    nested = _product(select.get("select", []), focus, type_, types)
    union = (
        [row for branch in select["unionAll"] for row in _select(branch, focus, type_, types)]
        if ("unionAll" in select)
        else [{}]
    )
    return [{**a, **b, **c} for a, b, c in product(own, nested, union)]


def _names(select: dict[str, Any]) -> list[str]:
    return [
        *(column["name"] for column in select.get("column", ())),
        *(name for inner in select.get("select", ()) for name in _names(inner)),
        *(_names(select["unionAll"][0]) if "unionAll" in select else ()),
    ]
