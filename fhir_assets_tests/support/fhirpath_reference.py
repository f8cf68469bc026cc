"""A second evaluator to compare with: fhirpathpy for paths, and the plainest possible reading of a ViewDefinition."""

import copy
from collections.abc import Iterator
from decimal import Decimal
from itertools import product
from typing import Any

import fhirpathpy
from fhirpathpy.models import models

from fhir_assets.fhir.model import r4

Row = dict[str, Any]


def plain(value: Any) -> Any:
    """A value so that the same numbers and dates are equal, whichever evaluator gave them."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, float | Decimal):
        return float(value)
    return str(value) if type(value).__name__.startswith("FP_") else value


def evaluate(focus: Any, path: str, type_: str) -> list[Any]:
    """What fhirpathpy gives for a focus of a type."""
    expression: Any = path if r4().types[type_].kind == "resource" else {"base": type_, "expression": path}
    found: list[Any] = plain(fhirpathpy.evaluate(copy.deepcopy(focus), expression, {}, models["r4"]))
    return found


def view_rows(view: dict[str, Any], resource: dict[str, Any], types: dict[str, str]) -> list[Row]:
    """The rows of a view; ``types`` gives the type that each ``forEach`` path leads to. Columns are collections."""
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
