"""The views of ``sql/views``, their FHIRPath expressions, and resources that fill their columns."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fhir_assets.fhir.views import CompiledViews, View, load_views
from fhir_assets_tests.support.saturated_resources import Resource, saturated, saturated_resources

VIEWS = Path(__file__).resolve().parents[2] / "sql" / "views"

Row = dict[str, object]


@cache
def views() -> dict[str, View]:
    """Return the views of ``sql/views`` by name."""
    return {view.name: view for view in load_views([VIEWS]).views}


def views_of_type(resource_type: str) -> list[View]:
    """Return the views of a resource type."""
    return [view for view in views().values() if view.resource_type == resource_type]


def paths(definition: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name and path of each column at any depth."""
    for column in definition.get("column", ()):
        yield column["name"], column["path"]
    for select in definition.get("select", ()):
        yield from paths(select)


def expressions(definition: Mapping[str, Any]) -> Iterator[str]:
    """Yield every FHIRPath expression of a view: of its columns and of ``forEach``."""
    yield from (path for _, path in paths(definition))
    for select in definition["select"]:
        yield from (select[key] for key in ("forEach", "forEachOrNull") if key in select)


def saturated_for_views(resource_type: str) -> Iterator[Resource]:
    """Yield saturated resources, and one for each set of literals that a view of the type compares with."""
    yield from saturated_resources(resource_type)
    compared = {
        tuple(re.findall(r"(\w+) = '([^']*)'", path))
        for view in views_of_type(resource_type)
        for path in expressions(view.definition)
    }
    for literals in sorted(compared):
        resource = saturated(resource_type, 0, {"focal": True, **dict(literals)})
        yield {**resource, "resourceType": resource_type, "id": "a"}


@cache
def compile_views_of_type(resource_type: str) -> CompiledViews:
    """Return the compiled views of a resource type."""
    return CompiledViews(views_of_type(resource_type), empty_join=False)


def build_rows(resource: Resource) -> dict[str, list[Row]]:
    """Return the rows of each view of the resource's type, by column."""
    compiled_views = compile_views_of_type(resource["resourceType"])
    return {
        view.name: [dict(zip((column.name for column in view.columns), row, strict=True)) for row in rows_of_view]
        for view, rows_of_view in zip(compiled_views.views, compiled_views.rows(resource), strict=True)
    }
