"""`fhir-assets runs`: list runs and show their counts."""

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from fhir_assets.cli.output import console, print_json, print_table
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.ops import run_history, runs

app = typer.Typer(help="List runs and show their counts.", no_args_is_help=True)

_LIST_COLUMNS = (
    "run",
    "started_at",
    "triggered_by",
    "status",
    "windows",
    "fetched",
    "older",
    "valid",
    "dead",
    "withheld",
    "superseded",
    "loaded",
    "seconds",
)
_TYPE_COLUMNS = (
    "resource_type",
    "status",
    "windows",
    "fetched",
    "older",
    "valid",
    "dead",
    "withheld",
    "superseded",
    "loaded",
    "seconds",
    "checkpoint_before",
    "checkpoint_after",
    "open_dead_letters",
)


@app.command("list")
def list_runs(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Print at most this many")] = 20,
    status: Annotated[str | None, typer.Option(help="Only this status: RUNNING, SUCCESS or FAILED")] = None,
    resource_type: Annotated[str | None, typer.Option("--type", help="Only runs of this resource type")] = None,
    since: Annotated[datetime | None, typer.Option(help="Only runs that started at this time (UTC) or later")] = None,
    triggered_by: Annotated[
        str | None, typer.Option("--by", help="Only this trigger, such as schedule, backfill, cli or replay")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """List the latest runs, newest first."""
    settings = load_settings()
    with Warehouse(settings).connect_read_only() as conn:
        latest = run_history.list_runs(
            conn,
            limit=limit,
            status=status.upper() if status else None,
            resource_type=resource_type,
            since=since and since.replace(tzinfo=UTC),
            triggered_by=triggered_by,
        )
    if json:
        print_json([{**run, "link": _link(settings, run["run_id"])} for run in latest])
    else:
        print_table("Runs", [{**run, "run": run["run_id"][:8]} for run in latest], _LIST_COLUMNS)


@app.command()
def show(
    run_id: Annotated[str, typer.Argument(help="The id of a run, or its first characters")],
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Show one run by resource type: counts, checkpoints and open dead letters."""
    settings = load_settings()
    with Warehouse(settings).connect_read_only() as conn:
        rows = run_history.list_types_of_run(conn, run_id)
        reasons = runs.get_errors(conn, rows[0]["run_id"]) if rows else {}
    if not rows:
        raise ConfigurationError(f"no run has an id that begins with {run_id}: `fhir-assets runs list` prints the ids")
    run = rows[0]
    if json:
        print_json([{**row, "link": _link(settings, run["run_id"])} for row in rows])
        return
    print_table(f"Run {run['run_id']}", [{**row, "open_dead_letters": _stages(row)} for row in rows], _TYPE_COLUMNS)
    if run["replay_of_run_id"]:
        console.print(f"Replay of run {run['replay_of_run_id']}", markup=False)
    for reason, types in reasons.items():
        console.print(f"{', '.join(types)}: {reason}", markup=False, soft_wrap=True)
    console.print(_link(settings, run["run_id"]), markup=False, soft_wrap=True)


def _stages(row: dict[str, Any]) -> str:
    return ", ".join(f"{stage} {count:,}" for stage, count in sorted(row["dead_letters"].items()))


def _link(settings: Settings, run_id: str) -> str:
    return f"{settings.dagster_ui_url.rstrip('/')}/runs/{run_id}"
