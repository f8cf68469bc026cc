"""SQL on FHIR v2: ViewDefinitions, and the rows they make of resources."""

from fhir_assets.fhir.views.compiled_views import CompiledViews, RowError
from fhir_assets.fhir.views.definition import Column, Problem, View, check_view, parse_view
from fhir_assets.fhir.views.view_files import BrokenView, ViewSet, load_views, read_definition, read_view

__all__ = [
    "BrokenView",
    "Column",
    "CompiledViews",
    "Problem",
    "RowError",
    "View",
    "ViewSet",
    "check_view",
    "load_views",
    "parse_view",
    "read_definition",
    "read_view",
]
