"""The runs of `fhir-assets ingest`, with a progress bar on a terminal."""

from collections.abc import Sequence

import dagster as dg
import psycopg
import sqlalchemy.exc
from dagster_postgres.utils import DagsterPostgresException
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fhir_assets.cli.load_reports import format_windows
from fhir_assets.cli.output import console, errors, hide_library_output, print_progress
from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.foreign_errors import translate_error
from fhir_assets.ingestion.outcome import Outcome
from fhir_assets.ingestion.runs import Ingestion, Listener
from fhir_assets.pipeline.due_windows import DueWindows
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.windows import WindowRange


def execute_loads(
    ingestion: Ingestion,
    due: DueWindows,
    types: Sequence[str],
    refresh: Refresh,
    *,
    triggered_by: str,
    quiet: bool,
) -> list[Outcome]:
    """Load the types of the due windows, each range in one run. Return the outcome of each run.

    Raises DatabaseUnavailable if the database becomes unavailable during a run.
    """
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
        task = progress.add_task("Loading", total=len(due) * steps)

        def listen(event: dg.EventLogEntry) -> None:
            kind = event.dagster_event_type
            if kind is dg.DagsterEventType.STEP_START and event.step_key:
                progress.update(task, description=event.step_key.replace("__", " "))
            elif kind in (dg.DagsterEventType.STEP_SUCCESS, dg.DagsterEventType.STEP_FAILURE):
                progress.advance(task)
            elif event.asset_observation and event.asset_observation.description:
                # The raw step reports the progress of a bulk export as observations.
                print_progress(event.asset_observation.description)

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
        progress.update(task, description="Loaded", completed=len(due) * steps)
    return outcomes


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
