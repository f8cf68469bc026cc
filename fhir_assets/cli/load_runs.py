"""The runs of `fhir-assets ingest`, with a progress bar on a terminal."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fhir_assets.cli.load_reports import format_windows
from fhir_assets.cli.output import console, errors, hide_library_output, print_progress
from fhir_assets.deployment.views import build_views
from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.ingestion.outcome import Loads, Outcome
from fhir_assets.ingestion.recorded_loads import RecordedLoads
from fhir_assets.ingestion.recorder_process import RecorderProcess
from fhir_assets.pipeline.due_windows import DueWindows
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.settings import Settings

_DAGSTER = "dagster"


@contextmanager
def prepare_loads(settings: Settings) -> Iterator[Callable[[], Loads]]:
    """Yield a function that returns what executes loads. Call this before the process opens a connection.

    A process that has imported Dagster by the time of the call records its loads itself.
    """
    build_views(settings)  # The recorder needs the views too, and inherits them.
    recorder = None if _DAGSTER in sys.modules else RecorderProcess()

    def open_loads() -> Loads:
        if recorder is not None and _DAGSTER not in sys.modules:
            return RecordedLoads(settings, recorder)
        from fhir_assets.ingestion.runs import open_ingestion

        return open_ingestion(settings)

    try:
        yield open_loads
    except BaseException:
        if recorder is not None:
            recorder.close(wait=False)
        raise
    if recorder is not None:
        recorder.close(wait=True)


class _ProgressBar:
    """Shows the progress of loads on a progress bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def begin_step(self, name: str) -> None:
        self._progress.update(self._task, description=name.replace("__", " "))

    def end_step(self) -> None:
        self._progress.advance(self._task)

    def show(self, text: str) -> None:
        print_progress(text)


def execute_loads(
    loads: Loads,
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
    steps = loads.count_steps()
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
        bar = _ProgressBar(progress, task)
        for windows in due:
            if not quiet:
                console.print(f"Windows {format_windows(windows)}")
            try:
                with hide_library_output():
                    outcome = loads.load_due(
                        windows, refresh=refresh, triggered_by=triggered_by, resource_types=types, listener=bar
                    )
            except DatabaseUnavailable:
                raise DatabaseUnavailable(
                    f"The database became unavailable while the windows {format_windows(windows)} were loaded; "
                    "unfinished work was discarded. Check that Postgres runs, then run the same command again"
                ) from None
            outcomes.append(outcome)
        progress.update(task, description="Loaded", completed=len(due) * steps)
    return outcomes
