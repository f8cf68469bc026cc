"""SQL on FHIR v2: ViewDefinitions, and the rows they make of resources."""

from fhir_assets.fhir.views.definition import Column, View, parse_view
from fhir_assets.fhir.views.load import BrokenView, ViewSet, load_views, read_view
from fhir_assets.fhir.views.rows import RowError, TypeViews

__all__ = ["BrokenView", "Column", "RowError", "TypeViews", "View", "ViewSet", "load_views", "parse_view", "read_view"]
