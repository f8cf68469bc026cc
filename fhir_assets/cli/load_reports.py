"""The output of commands about loads: counts, failed runs, windows that do not reconcile, and views without a table.

This module does not import Dagster, so that commands that execute no run start quickly.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fhir_assets.cli.output import errors, print_table
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.views import BrokenView
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import runs
from fhir_assets.windows import WindowRange

if TYPE_CHECKING:
    from fhir_assets.ingestion.outcome import Outcome

_SUMMARY_COLUMNS = (
    *("type", "fetched", "older", "valid", "dead", "withheld", "superseded", "loaded"),
    "resources_per_second",
)
_RARE_COLUMNS = frozenset({"older", "withheld", "superseded"})
_MAX_SHOWN_WINDOWS = 20


def summarize_runs(settings: Settings, outcomes: "Sequence[Outcome]") -> list[dict[str, object]]:
    """Return the counts of the runs by resource type, from ``ops.ingestion_runs``. The last row is the total."""
    if not outcomes:
        return []
    with Warehouse(settings).connect() as conn:
        return runs.summarize(conn, [outcome.run_id for outcome in outcomes])


def print_summary(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print the counts of runs by resource type. Columns that are rarely filled are printed only if they are filled."""
    columns = [name for name in _SUMMARY_COLUMNS if name not in _RARE_COLUMNS or any(row.get(name) for row in rows)]
    print_table(title, rows, columns)


def report_unreconciled_windows(windows: Sequence[Mapping[str, object]]) -> None:
    """Print the windows that do not reconcile."""
    for window in windows[:_MAX_SHOWN_WINDOWS]:
        faults = window["faults"]
        text = "; ".join(faults) if isinstance(faults, list) else ""
        errors.print(f"{window['type']} of {window['window']} does not reconcile: {text}", markup=False, soft_wrap=True)
    if len(windows) > _MAX_SHOWN_WINDOWS:
        errors.print(f"{len(windows) - _MAX_SHOWN_WINDOWS} more windows do not reconcile", markup=False)


def report_held_windows(held: Sequence[Mapping[str, str]]) -> None:
    """Print the windows that exports and deliveries held back, by destination."""
    for destination in dict.fromkeys(window["destination"] for window in held):
        windows = [f"{window['type']} of {window['window']}" for window in held if window["destination"] == destination]
        more = len(windows) - _MAX_SHOWN_WINDOWS
        shown = ", ".join(windows[:_MAX_SHOWN_WINDOWS]) + (f" and {more} more" if more > 0 else "")
        text = f"Held back from {destination} until they reconcile: {shown}"
        errors.print(text, markup=False, soft_wrap=True)


def report_failures(settings: Settings, failures: "Sequence[Outcome]") -> None:
    """Print the failed runs, and then each reason with the resource types that failed for this reason."""
    if not failures:
        return
    types_by_reason: dict[str, dict[str, None]] = {}
    with Warehouse(settings).connect() as conn:
        for outcome in failures:
            for reason, types in runs.get_errors(conn, outcome.run_id).items():
                types_by_reason.setdefault(reason, {}).update(dict.fromkeys(types))
    for outcome in failures:
        errors.print(f"Run {outcome.run_id} of {format_windows(outcome.windows)} failed", markup=False)
    for reason, names in types_by_reason.items():
        errors.print(f"  {', '.join(names)}: {reason}", markup=False, soft_wrap=True)


def report_broken_views(broken: Sequence[BrokenView]) -> None:
    """Print the ViewDefinitions that are not valid, whose tables are neither filled nor exported."""
    for view in broken:
        errors.print(f"No table, because the ViewDefinition is not valid: {view.message}", markup=False, soft_wrap=True)


def format_windows(windows: WindowRange) -> str:
    """Return the first and the last window of a range, and how many there are."""
    first, last = windows.windows[0].key, windows.windows[-1].key
    return first if first == last else f"{first} to {last} ({len(windows.windows)})"
