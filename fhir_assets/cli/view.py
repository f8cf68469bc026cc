"""`fhir-assets view`: ViewDefinitions listed, checked, and tried on files without a database."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fhir_assets.cli.output import console, errors, print_json, print_table
from fhir_assets.deployment.views import build_views
from fhir_assets.errors import ViewError
from fhir_assets.fhir.views import RowError, check_view, read_definition, read_view
from fhir_assets.fhir.views.preview import Format, run_view, write_rows
from fhir_assets.settings import load_settings

app = typer.Typer(help="SQL-on-FHIR ViewDefinitions: list, check, try.", no_args_is_help=True)


@app.command("list")
def list_views(json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False) -> None:
    """Every ViewDefinition of sql/views and FHIR_VIEWS; the broken ones with what is wrong. Exit code 1 if any is."""
    found = build_views(load_settings())
    rows = [
        {
            "view": view.name,
            "type": view.resource_type,
            "columns": len(view.columns),
            "version": view.version,
            "title": view.title,
            "file": str(view.path or ""),
        }
        for view in found.views
    ]
    if json:
        broken = [{"file": str(b.path), "error": b.message} for b in found.broken]
        print_json({"views": rows, "broken": broken})
    else:
        print_table(f"{len(rows)} views", rows, ("view", "type", "columns", "version", "title"))
        for b in found.broken:
            errors.print(f"broken: {b.message}", markup=False, soft_wrap=True)
    if found.broken:
        raise typer.Exit(1)


@app.command()
def check(view: Annotated[list[Path], typer.Argument(help="ViewDefinition files", metavar="VIEW.json…")]) -> None:
    """Say all that is wrong with ViewDefinitions, and where; exit code 1 if one of them is not valid."""
    invalid = 0
    for path in view:
        try:
            problems = check_view(read_definition(path))
        except ViewError as error:
            invalid += 1
            errors.print(str(error), markup=False, soft_wrap=True)
            continue
        for problem in problems:
            errors.print(
                f"{path}: {problem.location}: {problem.severity}: {problem.message}", markup=False, soft_wrap=True
            )
        if any(problem.severity == "error" for problem in problems):
            invalid += 1
            continue
        found = read_view(path)
        console.print(f"{path}: {found.name}: {len(found.columns)} columns of {found.resource_type}", markup=False)
        for expression in found.fallbacks:
            console.print(f"  not compiled, evaluated slowly: {expression}", markup=False, soft_wrap=True)
    if invalid:
        raise typer.Exit(1)


@app.command()
def run(
    view: Annotated[Path, typer.Argument(help="A ViewDefinition", metavar="VIEW.json")],
    data: Annotated[list[Path], typer.Argument(help="NDJSON, a resource or a Bundle; .gz too", metavar="DATA…")],
    form: Annotated[Format, typer.Option("--format")] = "table",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file instead of the terminal")] = None,
) -> None:
    """Print the rows of a view over files. Resources it cannot make rows of are named on stderr; exit code 1 then."""
    definition = read_view(view)
    refused = 0

    def refuse(place: str, error: RowError) -> None:
        nonlocal refused
        refused += 1
        errors.print(f"{place}: {error}", markup=False, soft_wrap=True)

    rows = run_view(definition, data, refused=refuse)
    if output:
        with output.open("wb") as file:
            write_rows(rows, definition.columns, form, file)
    else:
        write_rows(rows, definition.columns, form, sys.stdout.buffer)
    if refused:
        raise typer.Exit(1)
