"""`fhir-assets ingest`: load windows without the Dagster UI."""

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated

import dagster as dg
import psycopg
import sqlalchemy.exc
import typer
from dagster_postgres.utils import DagsterPostgresException
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fhir_assets.cli.lake import LakeReport, report_lake, write_lake
from fhir_assets.cli.load_reports import (
    format_windows,
    print_summary,
    report_broken_views,
    report_failures,
    report_held_windows,
    report_unreconciled_windows,
    summarize_runs,
)
from fhir_assets.cli.output import console, errors, hide_library_output, print_json
from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError, DatabaseUnavailable, FhirAssetsError, StoreError
from fhir_assets.foreign_errors import translate_error
from fhir_assets.ingestion import Ingestion, Listener, Outcome, choose_exit_code, select_failed
from fhir_assets.orchestration.checks.known_patients import describe_unknown_denials
from fhir_assets.orchestration.instance import config
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.ops import consents, held_windows
from fhir_assets.windows import WindowRange


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
    ingestion = open_ingestion(settings)
    outcomes = load_due(
        ingestion, settings, first=_assume_utc(first), last=_assume_utc(last), full_refresh=full_refresh, quiet=json
    )
    rows = summarize_runs(settings, outcomes)
    failures = select_failed(outcomes)
    unreconciled = find_unreconciled_windows(ingestion)
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


def open_ingestion(settings: Settings) -> Ingestion:
    """Return the definitions of the deployment with its Dagster instance. Building them takes most of a second."""
    return Ingestion(settings, build_definitions(settings), config.open_instance(settings))


def load_due(
    ingestion: Ingestion,
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
    ingestion.create_tables()
    due = ingestion.find_due(first=first, last=last, all_windows=full_refresh, on_progress=_print_progress)
    ingestion.begin_checkpoints(due)
    explicit = first is not None or last is not None
    refresh = Refresh.FULL if full_refresh else Refresh.WINDOW if explicit else Refresh.MISSING
    types = list(settings.fhir_resource_types)
    if refresh is Refresh.MISSING:
        types = ingestion.extend(due)
        due = due if types else replace(due, ranges=())
    if due and not quiet and (missing := ingestion.find_types_not_offered()):
        console.print(f"Skipped, because the source does not have them: {', '.join(missing)}")
    if not due:
        ingestion.apply_consent(build_views(settings).views, actor=triggered_by)
    steps = ingestion.count_steps()
    outcomes = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors,
        disable=quiet or not errors.is_terminal,
    ) as progress:
        task = progress.add_task("Loading", total=max(1, len(due)) * steps, visible=bool(due))

        def listen(event: dg.EventLogEntry) -> None:
            kind = event.dagster_event_type
            if kind is dg.DagsterEventType.STEP_START and event.step_key:
                progress.update(task, description=event.step_key.replace("__", " "))
            elif kind in (dg.DagsterEventType.STEP_SUCCESS, dg.DagsterEventType.STEP_FAILURE):
                progress.advance(task)
            elif event.asset_observation and event.asset_observation.description:
                # The raw step reports the progress of a bulk export as observations.
                _print_progress(event.asset_observation.description)

        for windows in due:
            if not quiet:
                console.print(f"Windows {format_windows(windows)}")
            with hide_library_output():
                outcome = _load(ingestion, windows, types, refresh, triggered_by, listen)
            if outcome is None:
                raise DatabaseUnavailable(
                    f"The database became unavailable while the windows {format_windows(windows)} were loaded; "
                    "unfinished work was discarded. Check that Postgres runs, then run the same command again"
                )
            outcomes.append(outcome)
        progress.update(task, description="Loaded", completed=max(1, len(due)) * steps)
    return outcomes


def _print_progress(text: str) -> None:
    """Print the progress of a bulk export to stderr, above the progress bar; stdout contains only the summary."""
    errors.print(text, markup=False, soft_wrap=True)


def _load(
    ingestion: Ingestion,
    windows: WindowRange,
    types: Sequence[str],
    refresh: Refresh,
    triggered_by: str,
    listener: Listener,
) -> Outcome | None:
    """Load the types of the windows in one run. Return None if Dagster's storage or the tables became unavailable."""
    try:
        return ingestion.load(
            windows, refresh=refresh, triggered_by=triggered_by, listener=listener, resource_types=types
        )
    except (psycopg.OperationalError, sqlalchemy.exc.OperationalError, DagsterPostgresException) as error:
        known = translate_error(error)
        if known is not None and not isinstance(known, DatabaseUnavailable):
            raise known from None
        return None


def find_unreconciled_windows(ingestion: Ingestion) -> list[dict[str, object]]:
    """Return the windows that do not reconcile: resource type, partition key and what does not match."""
    with hide_library_output():
        unreconciled = ingestion.find_unreconciled_windows()
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
