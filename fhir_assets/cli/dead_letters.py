"""`fhir-assets dead-letters`: what could not go on, and why."""

from dataclasses import asdict
from typing import Annotated

import typer

from fhir_assets.cli.output import console, print_json, print_table
from fhir_assets.errors import ConfigurationError
from fhir_assets.resources.warehouse import Warehouse
from fhir_assets.settings import load_settings
from fhir_assets.warehouse import dead_letters
from fhir_assets.warehouse.dead_letters import Selection

app = typer.Typer(help="Resources that could not go on, each with its reason.", no_args_is_help=True)

_LISTED = ("id", "resource_type", "stage", "rule", "path", "partition_key", "status", "attempts", "last_failure")

Run = Annotated[str | None, typer.Option("--run", help="Failed in this run")]
Type = Annotated[str | None, typer.Option("--type", help="Resource type")]
Stage = Annotated[str | None, typer.Option(help="fetch, validate, transform or load")]
Rule = Annotated[str | None, typer.Option(help="Such as required-binding or invariant:obs-6")]
Status = Annotated[str | None, typer.Option(help="open, replaying, resolved, discarded; or all")]
Json = Annotated[bool, typer.Option("--json", help="Print as JSON")]


@app.command("list")
def list_letters(
    run: Run = None,
    resource_type: Type = None,
    stage: Stage = None,
    rule: Rule = None,
    status: Status = "open",
    limit: Annotated[int, typer.Option(min=1, max=100_000)] = 50,
    json: Json = False,
) -> None:
    """The newest dead letters that match."""
    chosen = Selection(
        run_id=run,
        resource_type=resource_type,
        stage=stage,
        rule=rule,
        status=None if status == "all" else status,
    )
    with Warehouse(load_settings()).connect() as conn:
        found = [asdict(letter) for letter in dead_letters.find(conn, chosen, limit=limit)]
    if json:
        print_json(found)
    else:
        print_table("Dead letters", found, _LISTED)


@app.command()
def show(
    letter: Annotated[int, typer.Argument(metavar="ID")],
    resource: Annotated[bool, typer.Option("--resource", help="Also print the resource itself: patient data")] = False,
    json: Json = False,
) -> None:
    """One dead letter with all of its issues."""
    with Warehouse(load_settings()).connect() as conn:
        stored = dead_letters.get(conn, letter)
        body = dead_letters.resource(conn, letter) if stored and resource else None
    if stored is None:
        raise ConfigurationError(
            f"there is no dead letter {letter}: `fhir-assets dead-letters list` shows what there is"
        )
    facts, issues = stored
    found: dict[str, object] = asdict(facts)
    if body is not None:
        found["resource"] = body.decode("utf-8", "backslashreplace")
    if json:
        print_json({**found, "issues": issues})
        return
    for name, value in found.items():
        console.print(f"{name.replace('_', ' '):>16}  {value}", markup=False, soft_wrap=True)
    if issues:
        print_table("Issues", issues, ("severity", "rule", "path", "message"))
