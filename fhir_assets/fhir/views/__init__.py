"""SQL on FHIR v2: ViewDefinitions, and the rows they make of resources."""

from fhir_assets.fhir.views.definition import Column, Problem, View, check_view, parse_view
from fhir_assets.fhir.views.load import BrokenView, ViewSet, load_views, read_definition, read_view
from fhir_assets.fhir.views.rows import RowError, TypeViews

__all__ = [
    "BrokenView",
    "Column",
    "Problem",
    "RowError",
    "TypeViews",
    "View",
    "ViewSet",
    "check_view",
    "load_views",
    "parse_view",
    "read_definition",
    "read_view",
]
