"""`fhir-assets ingest`: load windows without the Dagster UI."""

import os
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from fhir_assets.cli.lake import LakeReport, report_lake, write_lake
from fhir_assets.cli.load_reports import (
    print_summary,
    report_broken_views,
    report_failures,
    report_held_windows,
    report_unreconciled_windows,
    summarize_runs,
)
from fhir_assets.cli.load_runs import execute_loads, prepare_loads
from fhir_assets.cli.output import console, errors, hide_library_output, print_json, print_progress
from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError, FhirAssetsError, StoreError
from fhir_assets.ingestion import dagster_state
from fhir_assets.ingestion.due_loads import DueLoads
from fhir_assets.ingestion.outcome import Outcome, choose_exit_code, select_failed
from fhir_assets.pipeline.consent.unknown_denials import describe_unknown_denials
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.ops import consents, held_windows

if TYPE_CHECKING:
    from fhir_assets.ingestion.runs import Ingestion


def ingest(
    types: Annotated[
        str | None, typer.Option(help="Comma-separated resource types; default: FHIR_RESOURCE_TYPES")
    ] = None,
    first: Annotated[datetime | None, typer.Option("--from", help="Load the windows from this date (UTC)")] = None,
    last: Annotated[datetime | None, typer.Option("--to", help="Load the windows up to this date (UTC)")] = None,
    full_refresh: Annotated[bool, typer.Option("--full-refresh", help="Fetch all resources again")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON")] = False,
) -> None:
    """Load the windows from the checkpoint to now, or the windows of a date range.

    Each range of windows is loaded by one Dagster run. Without a date range, resource types to which the source has
    added nothing need no run. If FHIR_LAKE_URL is set, the lake is written as well.

    The exit code is 0 only if all windows were loaded, every window reconciles with the source, every ViewDefinition
    is valid, and the patient of every denial of consent is known. Dead letters are not a failure: `dead-letters list`
    prints them.
    """
    settings = load_settings(**({"fhir_resource_types": types} if types else {}))
    settings.require_source()
    if types:
        os.environ["FHIR_RESOURCE_TYPES"] = types
    outcomes = load_due(
        settings, first=_assume_utc(first), last=_assume_utc(last), full_refresh=full_refresh, quiet=json
    )
    rows = summarize_runs(settings, outcomes)
    failures = select_failed(outcomes)
    unreconciled = _find_unreconciled_windows(settings)
    held = _find_held_windows(settings)
    lake, lake_failure = _update_lake(settings)
    lake_error = str(lake_failure or "")
    lake_codes = [lake_failure.exit_code] if lake_failure else []
    broken = build_views(settings).broken
    denials = _count_unknown_denials(settings)
    run_ids = [outcome.run_id for outcome in outcomes]
    if json:
        print_json(
            {
                "runs": run_ids,
                "success": not (failures or unreconciled or broken or denials or lake_error),
                "types": rows,
                "unreconciled": unreconciled,
                "held_back": held,
                "lake": lake.rows if lake else [],
                "unknown_denials": denials,
                "broken_views": [{"file": str(view.path), "error": view.message} for view in broken],
            }
        )
    elif not outcomes:
        console.print("All windows are loaded: there is nothing to do.")
    else:
        print_summary("Loaded", rows)
    if lake and not json:
        report_lake(settings, lake)
    if lake_error:
        errors.print(f"The windows are loaded, but the lake is not written: {lake_error}", markup=False, soft_wrap=True)
    report_failures(settings, failures)
    report_unreconciled_windows(unreconciled)
    report_held_windows(held)
    report_broken_views(broken)
    if denials:
        errors.print(describe_unknown_denials(denials), markup=False, soft_wrap=True)
    if broken or denials:
        raise typer.Exit(1)
    if failures or lake_error:
        raise typer.Exit(choose_exit_code([*(outcome.exit_code for outcome in failures), *lake_codes]))
    if unreconciled:
        raise typer.Exit(1)


def _update_lake(settings: Settings) -> tuple[LakeReport | None, FhirAssetsError | None]:
    """Write the lake if there is one. Return what was done, and why it could not be written."""
    if not settings.fhir_lake_url:
        return None, None
    try:
        return write_lake(settings, None, actor="cli"), None
    except (StoreError, ConfigurationError) as error:
        return None, error


def load_due(
    settings: Settings,
    *,
    first: datetime | None = None,
    last: datetime | None = None,
    full_refresh: bool = False,
    quiet: bool = False,
    triggered_by: str = "cli",
) -> list[Outcome]:
    """Load the windows that are due, with a progress bar on a terminal. Return the outcome of each run.

    ``first`` and ``last`` select the windows of a date range instead. Raises DatabaseUnavailable if the database
    becomes unavailable during a run.
    """
    with prepare_loads(settings) as open_loads:
        loads = DueLoads(settings)
        loads.create_tables()
        ingestion = None
        if dagster_state.may_have_dead_runs(settings, Warehouse(settings)):
            ingestion = _open_ingestion(settings)
            ingestion.fail_dead_runs()
        due = loads.find(first=first, last=last, all_windows=full_refresh, on_progress=print_progress)
        loads.begin_checkpoints(due)
        explicit = first is not None or last is not None
        refresh = Refresh.FULL if full_refresh else Refresh.WINDOW if explicit else Refresh.MISSING
        types = list(settings.fhir_resource_types)
        if refresh is Refresh.MISSING:
            types = loads.extend(due)
            due = due if types else replace(due, ranges=())
        if not due:
            loads.apply_consent(actor=triggered_by)
            return []
        if not quiet and (missing := loads.find_types_not_offered()):
            console.print(f"Skipped, because the source does not have them: {', '.join(missing)}")
        if ingestion is None and dagster_state.limits_fetches(settings):
            ingestion = _open_ingestion(settings)  # Its steps wait for a slot of the pool.
        return execute_loads(ingestion or open_loads(), due, types, refresh, triggered_by=triggered_by, quiet=quiet)


def _open_ingestion(settings: Settings) -> "Ingestion":
    from fhir_assets.ingestion.runs import open_ingestion  # It imports Dagster.

    return open_ingestion(settings)


def _find_unreconciled_windows(settings: Settings) -> list[dict[str, object]]:
    """Return the windows that do not reconcile: resource type, partition key and what does not match."""
    if not dagster_state.may_have_unreconciled_windows(settings):
        return []
    with hide_library_output():
        unreconciled = _open_ingestion(settings).find_unreconciled_windows()
    return [{"type": name, "window": counts.partition_key, "faults": counts.faults} for name, counts in unreconciled]


def _find_held_windows(settings: Settings) -> list[dict[str, str]]:
    """Return the windows that deliveries and exports hold back until they reconcile, not those that only wait."""
    with Warehouse(settings).connect() as conn:
        return [
            {"destination": destination, "type": name, "window": window}
            for destination, name, window in held_windows.list_unreconciled(conn)
        ]


def _count_unknown_denials(settings: Settings) -> int:
    with Warehouse(settings).connect() as conn:
        return consents.count_unknown_denials(conn, build_consent_gate(settings))


def _assume_utc(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment and moment.tzinfo is None else moment
