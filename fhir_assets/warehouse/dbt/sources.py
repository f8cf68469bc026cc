"""The tables as dbt sources and staging models, generated from the ViewDefinitions of the deployment.

A source has the asset key of the asset that loads its table, so that dagster-dbt joins the lineage of both.
"""

from collections.abc import Iterable, Mapping, Sequence
from string import Template
from typing import Any

from fhir_assets.fhir.views import View
from fhir_assets.warehouse.postgres.tables.layout import (
    BLIND_INDEX_SUFFIX,
    SOURCE_COLUMN,
    PhiTreatment,
    build_layout,
    find_targets,
    phi_treatment,
)

SOURCE = "fhir"
"""The name of the dbt source, and of the schema of its tables in Postgres."""

_DERIVED = ("_precision", "_date", "_offset", BLIND_INDEX_SUFFIX)
"""The suffixes of columns that a table has beside a column of its view."""

_DELETED_COLUMNS = {
    "type": "Resource type",
    "id": "Logical id of the resource",
    "deleted_at": "When it was deleted at the source",
    "recorded_at": "When the deletion was recorded here",
    "why": "How the deletion became known",
}


def build_sources(views: Sequence[View], *, lake_url: str | None, encrypted: bool) -> dict[str, Any]:
    """Return the content of ``sources.yml``: a source with a table for each view and ``fhir.deleted``.

    ``lake_url`` is the folder of the lake, from which dbt-duckdb reads the tables; it may also be set later with the
    environment variable FHIR_LAKE_URL.
    """
    names = {view.name for view in views}
    lake = f"{{{{ env_var('FHIR_LAKE_URL', '{lake_url or 'lake'}') }}}}"
    files = f"read_parquet('{lake}/{{name}}/*/*.parquet', hive_partitioning = false, union_by_name = true)"
    deleted = {
        "name": "deleted",
        "description": "Resources that were deleted at their source. Not in the lake.",
        "columns": [{"name": name, "description": text} for name, text in _DELETED_COLUMNS.items()],
    }
    return {
        "version": 2,
        "sources": [
            {
                "name": SOURCE,
                "schema": SOURCE,
                "description": "The tables of fhir_assets: one for each ViewDefinition of SQL on FHIR.",
                "config": {"meta": {"external_location": files}},
                "tables": [*(_build_table(view, names, encrypted=encrypted) for view in views), deleted],
            }
        ],
    }


def build_staging_models(views: Iterable[View], template: Template, *, encrypted: bool) -> dict[str, str]:
    """Return an incremental dbt model for each view whose rows have a key, by the name of the model.

    ``template`` is the model of one table, with the variables ``table`` and ``key``.
    """
    models = {}
    for view in views:
        layout = build_layout(view, encrypted=encrypted)
        if layout.identity and layout.loaded_at:
            key = ", ".join(f"'{column}'" for column in (*layout.identity, SOURCE_COLUMN))
            models[f"stg_{view.name}"] = template.substitute(table=layout.name, key=key)
    return models


def _build_table(view: View, names: set[str], *, encrypted: bool) -> dict[str, Any]:
    layout = build_layout(view, encrypted=encrypted)
    targets = {name: target for name, target in find_targets(view, layout.key).items() if target in names}
    phi = _find_phi(view)
    table: dict[str, Any] = {
        "name": view.name,
        "description": layout.description or view.title or "",
        "config": {"meta": {"dagster": {"asset_key": ["normalized", view.name]}, "resource_type": view.resource_type}},
    }
    if layout.identity:
        table["data_tests"] = [{"row_key": {"arguments": {"columns": list(layout.identity)}}}]
    table["columns"] = []
    for column in layout.readable_columns:
        entry: dict[str, Any] = {
            "name": column.name,
            "description": column.description or "",
            "data_type": column.type,
        }
        if column.name in phi:
            entry["config"] = {"meta": {"phi": phi[column.name]}}
        if target := targets.get(column.name):
            entry["data_tests"] = [_build_relationship(target)]
        table["columns"].append(entry)
    return table


def _build_relationship(table: str) -> dict[str, Any]:
    """Return a test of a key. It warns, because a resource may refer to one that the tables do not have."""
    return {
        "reference_key": {
            "arguments": {"to": f"source('{SOURCE}', '{table}')", "field": "id"},
            "config": {"severity": "warn"},
        }
    }


def _find_phi(view: View) -> Mapping[str, str]:
    """Return the treatment of each column with patient data, and of the columns that are derived from one."""
    phi: dict[str, str] = {}
    for column in view.columns:
        treatment = phi_treatment(column, encrypted=True)
        if treatment is not PhiTreatment.NONE:
            phi.update(dict.fromkeys((column.name, *(column.name + end for end in _DERIVED)), treatment.value))
    return phi
