"""`fhir-assets runs`: what ran, and what came of it."""

from typing import Annotated

import typer

from fhir_assets.cli.output import print_json, print_table
from fhir_assets.errors import ConfigurationError
from fhir_assets.resources.warehouse import Warehouse
from fhir_assets.settings import load_settings
from fhir_assets.warehouse import run_history

app = typer.Typer(help="What ran, and what came of it.", no_args_is_help=True)

_LISTED = ("run", "started_at", "triggered_by", "status", "windows", "fetched", "valid", "dead", "loaded", "seconds")
_SHOWN = ("resource_type", "status", "windows", "fetched", "valid", "dead", "withheld", "loaded", "seconds", "error")


@app.command("list")
def list_runs(
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 20,
    status: Annotated[str | None, typer.Option(help="RUNNING, SUCCESS or FAILED")] = None,
    resource_type: Annotated[str | None, typer.Option("--type")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """The latest runs, newest first."""
    with Warehouse(load_settings()).connect() as conn:
        found = run_history.latest(conn, limit=limit, status=status, resource_type=resource_type)
    if json:
        print_json(found)
    else:
        print_table("Runs", [{**run, "run": run["run_id"][:8]} for run in found], _LISTED)


@app.command()
def show(
    run_id: Annotated[str, typer.Argument(help="A run's id, or its first characters")],
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """One run, by resource type."""
    with Warehouse(load_settings()).connect() as conn:
        found = run_history.by_type(conn, run_id)
    if not found:
        raise ConfigurationError(f"no run begins with {run_id}: `fhir-assets runs list` shows those there are")
    if json:
        print_json(found)
    else:
        print_table(f"Run {found[0]['run_id']}", found, _SHOWN)
