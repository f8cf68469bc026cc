"""`fhir-assets runs`: what ran, and what came of it."""

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from fhir_assets.cli.output import console, print_json, print_table
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.ops import run_history, runs

app = typer.Typer(help="What ran, and what came of it.", no_args_is_help=True)

_LISTED = ("run", "started_at", "triggered_by", "status", "windows", "fetched", "valid", "dead", "loaded", "seconds")
_SHOWN = (
    "resource_type",
    "status",
    "windows",
    "fetched",
    "valid",
    "dead",
    "withheld",
    "loaded",
    "seconds",
    "checkpoint_before",
    "checkpoint_after",
    "open_dead_letters",
)


@app.command("list")
def list_runs(
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 20,
    status: Annotated[str | None, typer.Option(help="RUNNING, SUCCESS or FAILED")] = None,
    resource_type: Annotated[str | None, typer.Option("--type")] = None,
    since: Annotated[datetime | None, typer.Option(help="Started since, UTC")] = None,
    triggered_by: Annotated[str | None, typer.Option("--by", help="Such as schedule, backfill, cli, replay")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """The latest runs, newest first."""
    settings = load_settings()
    with Warehouse(settings).connect_read_only() as conn:
        found = run_history.list_runs(
            conn,
            limit=limit,
            status=status.upper() if status else None,
            resource_type=resource_type,
            since=since and since.replace(tzinfo=UTC),
            triggered_by=triggered_by,
        )
    if json:
        print_json([{**run, "link": _link(settings, run["run_id"])} for run in found])
    else:
        print_table("Runs", [{**run, "run": run["run_id"][:8]} for run in found], _LISTED)


@app.command()
def show(
    run_id: Annotated[str, typer.Argument(help="A run's id, or its first characters")],
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """One run, by resource type: its counts, its checkpoints, what of it is a dead letter still."""
    settings = load_settings()
    with Warehouse(settings).connect_read_only() as conn:
        found = run_history.list_types_of_run(conn, run_id)
        reasons = runs.get_errors(conn, found[0]["run_id"]) if found else {}
    if not found:
        raise ConfigurationError(f"no run begins with {run_id}: `fhir-assets runs list` shows those there are")
    whole = found[0]
    if json:
        print_json([{**row, "link": _link(settings, whole["run_id"])} for row in found])
        return
    print_table(f"Run {whole['run_id']}", [{**row, "open_dead_letters": _stages(row)} for row in found], _SHOWN)
    if whole["replay_of_run_id"]:
        console.print(f"Replay of run {whole['replay_of_run_id']}", markup=False)
    for reason, types in reasons.items():
        console.print(f"{', '.join(types)}: {reason}", markup=False, soft_wrap=True)
    console.print(_link(settings, whole["run_id"]), markup=False, soft_wrap=True)


def _stages(row: dict[str, Any]) -> str:
    return ", ".join(f"{stage} {count:,}" for stage, count in sorted(row["dead_letters"].items()))


def _link(settings: Settings, run_id: str) -> str:
    return f"{settings.dagster_ui_url.rstrip('/')}/runs/{run_id}"
