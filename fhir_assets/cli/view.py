"""`fhir-assets view`: list and check ViewDefinitions, and run them over files without a database."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fhir_assets.cli.output import console, errors, open_output, print_json, print_table
from fhir_assets.deployment.views import build_views, find_view_folders, validate_view
from fhir_assets.errors import ConfigurationError, NotFhir, ViewError
from fhir_assets.fhir.views import (
    CompiledViews,
    RowError,
    View,
    find_problems,
    load_views,
    read_definition,
    read_view,
)
from fhir_assets.fhir.views.extension import EXTENDS
from fhir_assets.fhir.views.preview import Format, run_view, write_rows
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.tables.layout import build_layout
from fhir_assets.warehouse.postgres.tables.layout_warnings import find_warnings

app = typer.Typer(help="List and check ViewDefinitions of SQL on FHIR, and run them over files.", no_args_is_help=True)


@app.command("list")
def list_views(json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False) -> None:
    """List the ViewDefinitions of sql/views and FHIR_VIEWS. The exit code is 1 if one is not valid."""
    view_set = build_views(load_settings())
    rows = [
        {
            "view": view.name,
            "type": view.resource_type,
            "columns": len(view.columns),
            "version": view.version,
            "title": view.title,
            "file": str(view.path or ""),
        }
        for view in view_set.views
    ]
    if json:
        broken = [{"file": str(view.path), "error": view.message} for view in view_set.broken]
        print_json({"views": rows, "broken": broken})
    else:
        print_table(f"{len(rows)} views", rows, ("view", "type", "columns", "version", "title"))
        for broken_view in view_set.broken:
            errors.print(f"not valid: {broken_view.message}", markup=False, soft_wrap=True)
    if view_set.broken:
        raise typer.Exit(1)


@app.command()
def check(
    view: Annotated[
        list[Path] | None, typer.Argument(help="ViewDefinition files, or folders of them", metavar="[VIEW.json…]")
    ] = None,
    check_all: Annotated[
        bool, typer.Option("--all", help="Check every view of FHIR_VIEWS, or of sql/views if it is not set")
    ] = False,
) -> None:
    """Print the problems of ViewDefinitions with their locations. The exit code is 1 if one is not valid.

    A view is also not valid if Postgres could not have its table, with or without encryption keys, if its paths are
    nested too deeply, or, with --all, if another view has its name.
    """
    own = [find_view_folders(load_settings())[-1]] if check_all else []
    paths = _list_files([*(view or ()), *own])
    invalid = {path for path in paths if not _check_file(path)}
    for broken in build_views(load_settings()).broken if check_all else ():
        if broken.path in paths and broken.path not in invalid:
            invalid.add(broken.path)
            errors.print(broken.message, markup=False, soft_wrap=True)
    if check_all or len(paths) > 1:
        console.print(f"{len(paths)} views, {len(invalid)} of them not valid.")
    if invalid:
        raise typer.Exit(1)


def _list_files(given: Sequence[Path]) -> list[Path]:
    """Return the files, and the JSON files of the folders, in ``given``. Raises ConfigurationError if there is none."""
    paths = [file for path in given for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not paths:
        raise ConfigurationError("there is no ViewDefinition to check: name files or folders, or pass --all")
    return list(dict.fromkeys(paths))


def _check_file(path: Path) -> bool:
    """Print the problems of the view in a file, or what it is. Return whether it is valid."""
    views = _load_others(path)
    try:
        problems = find_problems(path, views)
    except ViewError as error:
        errors.print(str(error), markup=False, soft_wrap=True)
        return False
    for problem in problems:
        errors.print(f"{path}: {problem.location}: {problem.severity}: {problem.message}", markup=False, soft_wrap=True)
    if any(problem.severity == "error" for problem in problems):
        return False
    definition = read_view(path, views=views)
    try:
        CompiledViews([definition])
        layouts = [build_layout(definition, encrypted=encrypted) for encrypted in (False, True)]
    except ViewError as error:
        errors.print(f"{path}: error: {error}", markup=False, soft_wrap=True)
        return False
    for warning in dict.fromkeys(warning for layout in layouts for warning in find_warnings(layout)):
        errors.print(f"{path}: warning: {warning}", markup=False, soft_wrap=True)
    console.print(
        f"{path}: {definition.name}: {len(definition.columns)} columns of {definition.resource_type}", markup=False
    )
    for expression in definition.fallbacks:
        console.print(f"  not compiled, so evaluated slowly: {expression}", markup=False, soft_wrap=True)
    return True


def _load_others(path: Path) -> Mapping[str, View]:
    """Return the views of the deployment that the view in a file may extend, by name; none if it extends no view."""
    try:
        if EXTENDS not in read_definition(path):
            return {}
    except ViewError:
        return {}
    settings = load_settings()
    validate = partial(validate_view, encrypted=settings.encrypts)
    folders = find_view_folders(settings)
    others = load_views(folders, leave_out={path}, trusted=folders[:1], validate=validate)
    return {view.name: view for view in others.views}


@app.command()
def run(
    view: Annotated[Path, typer.Argument(help="ViewDefinition file", metavar="VIEW.json")],
    data: Annotated[
        list[Path],
        typer.Argument(help="Files of NDJSON, a resource or a Bundle, or folders; also .gz", metavar="DATA…"),
    ],
    form: Annotated[Format, typer.Option("--format", help="Format of the rows")] = "table",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to replace with the rows; default, and -: stdout")
    ] = None,
) -> None:
    """Print the rows of a view over files.

    Lines that are not resources, and resources whose rows are not valid, are skipped: stderr lists them with file, line
    and reason, and the exit code is 1. The output contains the rows of all other resources.
    """
    definition = read_view(view, views=_load_others(view))
    skipped = 0

    def report(location: str, error: NotFhir | RowError) -> None:
        nonlocal skipped
        skipped += 1
        errors.print(f"{location}: {error}", markup=False, soft_wrap=True)

    with open_output(output, "--output") as file:
        write_rows(run_view(definition, data, on_error=report), definition.columns, form, file)
    if skipped:
        errors.print(f"{skipped:,} lines or resources were skipped; the rows of the others are written.")
        raise typer.Exit(1)
