"""`fhir-assets reconcile`: compare the source with the store and the tables now."""

from collections.abc import Sequence
from typing import Annotated

import typer

from fhir_assets.cli.output import console, errors, hide_library_output, print_json, print_table
from fhir_assets.deployment.source import open_source
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.pipeline.reconcile.source_comparison import ComparableSource, TypeComparison, compare_type
from fhir_assets.pipeline.type_failures import TypeFailures
from fhir_assets.settings import load_settings

_COLUMNS = (
    "type",
    "source",
    "loaded",
    "withheld",
    "dead",
    "older",
    "due",
    "missing",
    "surplus",
    "unreconciled_windows",
)
_MAX_SHOWN = 20


def reconcile(
    types: Annotated[
        str | None, typer.Option(help="Comma-separated resource types; default: FHIR_RESOURCE_TYPES")
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read all resources of the source; compare ids and versions")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Compare the resources of the source with the store and the tables, and list missing ones. Nothing is changed.

    Without --deep, the totals of the source are compared by type. Resources that were updated after the last load are
    due, not missing. Additional resources in the tables are reported, but are not an error. The exit code is 0 only if
    every resource of the source is accounted for; it is 1 if the source cannot count its resources or offers none of
    the types.
    """
    settings = load_settings(**({"fhir_resource_types": types} if types else {}))
    warehouse = Warehouse(settings)
    source = open_source(settings, warehouse=warehouse)
    if not isinstance(source, ComparableSource):
        raise ConfigurationError(
            f"the source {source.name} cannot be compared on demand: set FHIR_SOURCE to search for this command"
        )
    store, views = build_store(settings), build_views(settings).views
    offered = source.list_types()
    failures = TypeFailures()
    compared: list[TypeComparison] = []
    not_offered = [name for name in settings.fhir_resource_types if offered is not None and name not in offered]
    with hide_library_output():
        for name in settings.fhir_resource_types:
            if name in not_offered:
                continue
            with failures.collect(name), warehouse.connect() as conn:
                compared.append(compare_type(conn, source, store, views, settings.window_scheme, name, deep=deep))
    complete = bool(compared) and all(comparison.complete for comparison in compared) and not failures
    if json:
        types_as_json = [_to_json(comparison) for comparison in compared]
        print_json({"complete": complete, "types": types_as_json, "not_offered": not_offered})
    else:
        print_table("Source and tables", [_to_row(comparison) for comparison in compared], _COLUMNS)
        if not_offered:
            errors.print(f"Not compared, because the source does not have them: {', '.join(not_offered)}", markup=False)
        _explain(compared, deep=deep)
    failures.raise_collected()
    if not complete:
        raise typer.Exit(1)


def _to_row(comparison: TypeComparison) -> dict[str, object]:
    return {
        "type": comparison.resource_type,
        "source": _show(comparison.source_total),
        "loaded": comparison.accounted.loaded,
        "withheld": comparison.accounted.withheld,
        "dead": comparison.accounted.dead,
        "older": _show(comparison.older),
        "due": _show(comparison.due),
        "missing": _show(comparison.missing),
        "surplus": _show(comparison.surplus),
        "unreconciled_windows": len(comparison.unreconciled_windows),
    }


def _show(count: int | None) -> int | str:
    return "unknown" if count is None else count


def _to_json(comparison: TypeComparison) -> dict[str, object]:
    row = _to_row(comparison)
    counts = {name: None if value == "unknown" else value for name, value in row.items()}
    windows = [{"window": window.partition_key, "faults": window.faults} for window in comparison.unreconciled_windows]
    return counts | {"missing_ids": list(comparison.missing_ids), "unreconciled_windows": windows}


def _explain(compared: Sequence[TypeComparison], *, deep: bool) -> None:
    """Print what is missing and how to load it."""
    for comparison in compared:
        name = comparison.resource_type
        if comparison.missing is None:
            errors.print(f"{name}: the source does not count its resources; --deep compares them one by one")
        elif comparison.missing:
            errors.print(
                f"{name}: {comparison.missing:,} are missing: load them by `fhir-assets ingest --full-refresh`"
            )
        if comparison.surplus:
            errors.print(
                f"{name}: {comparison.surplus:,} in the tables are not at the source: it deleted them, or they came "
                "through another channel; `fhir-assets ingest --full-refresh` removes what the source deleted",
                soft_wrap=True,
            )
        for identity in comparison.missing_ids[:_MAX_SHOWN]:
            errors.print(f"  {name}/{identity}", markup=False)
        for window in comparison.unreconciled_windows[:_MAX_SHOWN]:
            errors.print(f"{name} of {window.partition_key}: {'; '.join(window.faults)}", markup=False, soft_wrap=True)
    if compared and all(comparison.complete for comparison in compared):
        console.print("Everything is accounted for.")
    elif not deep and any(comparison.missing for comparison in compared):
        errors.print("`fhir-assets reconcile --deep` names the missing resources.")
