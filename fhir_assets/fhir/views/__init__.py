"""SQL on FHIR v2 (https://sql-on-fhir.org/ig): ViewDefinitions and the rows that they compute from resources.

``definition`` parses a ViewDefinition, ``compiled_views`` compiles the views of a resource type to one Python function.
"""

from fhir_assets.fhir.views.compiled_views import CompiledViews, RowError, check_nesting
from fhir_assets.fhir.views.definition import Problem, View, check_view, parse_view
from fhir_assets.fhir.views.plan import Column
from fhir_assets.fhir.views.row_identity import ReferenceColumn, find_reference_columns
from fhir_assets.fhir.views.view_files import (
    BrokenView,
    FileVersion,
    ViewSet,
    find_problems,
    list_versions,
    load_views,
    read_definition,
    read_view,
)

__all__ = [
    "BrokenView",
    "Column",
    "CompiledViews",
    "FileVersion",
    "Problem",
    "ReferenceColumn",
    "RowError",
    "View",
    "ViewSet",
    "check_nesting",
    "check_view",
    "find_problems",
    "find_reference_columns",
    "list_versions",
    "load_views",
    "parse_view",
    "read_definition",
    "read_view",
]
