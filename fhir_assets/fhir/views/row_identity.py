"""Derives from the definition of a view which columns identify its rows and its resource, and which are references."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fhir_assets.fhir.path.expressions import Expression, IndexVariable
from fhir_assets.fhir.views.definition import View
from fhir_assets.fhir.views.plan import Select

_RESOURCE_KEY = "getResourceKey()"
_REFERENCE_KEY = re.compile(r"getReferenceKey\(\s*([A-Za-z]*)\s*\)")
_ITERATIONS = ("forEach", "forEachOrNull", "repeat")


@dataclass(frozen=True, slots=True)
class ReferenceColumn:
    """A column of a view that contains the ids of other resources.

    ``target`` is their resource type, or None if the column ``reference`` of the view contains the type.
    """

    view: str
    column: str
    target: str | None


def find_reference_columns(view: View) -> list[ReferenceColumn]:
    """Return the columns of a view whose path contains ``getReferenceKey()``."""
    names = {column.name for column in view.columns}
    reference_columns = []
    for name, path in _iterate_columns(view.definition):
        call = _REFERENCE_KEY.search(path)
        if call and name in names and (call[1] or "reference" in names):
            reference_columns.append(ReferenceColumn(view.name, name, call[1] or None))
    return reference_columns


def find_key_column(view: View) -> str | None:
    """Return the first column that every row fills with the key of its resource, or None if there is none.

    A column with patient data is not returned: its values may be stored encrypted.
    """
    tags = {column.name: column.tags for column in view.columns}
    for select in view.definition.get("select", ()):
        if any(iteration in select for iteration in _ITERATIONS):
            continue
        for column in select.get("column", ()):
            name = column.get("name")
            if column.get("path") == _RESOURCE_KEY and tags[name].get("phi", "none") == "none":
                return str(name)
    return None


def find_identity(view: View) -> tuple[str, ...]:
    """Return the columns that together identify a row of a source: the key, and the position in each loop.

    Return an empty tuple if the definition has no such columns: without a column of the key, with ``unionAll``, or if a
    loop has no column with the path ``%rowIndex``.
    """
    key = find_key_column(view)
    positions = _find_positions(view.plan.selects)
    return () if key is None or positions is None else (key, *positions)


def _find_positions(selects: Sequence[Select]) -> list[str] | None:
    """Return the columns with the position in each loop of ``selects``, or None if a loop has none."""
    found: list[str] = []
    for select in selects:
        if select.union:
            return None
        if select.iteration and not (isinstance(select.over, Expression) and not select.over.many):
            own = [f.column.name for f in select.filled_columns if isinstance(f.path, IndexVariable)]
            if not own:
                return None
            found.append(own[0])
        inner = _find_positions(select.selects)
        if inner is None:
            return None
        found += inner
    return found


def _iterate_columns(node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and path of each column of a ViewDefinition, including those of nested selects."""
    for column in node.get("column", ()):
        yield column.get("name", ""), column.get("path", "")
    for child in (*node.get("select", ()), *node.get("unionAll", ())):
        yield from _iterate_columns(child)
