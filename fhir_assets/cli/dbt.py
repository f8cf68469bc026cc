"""`fhir-assets dbt`: a dbt package over the tables."""

from pathlib import Path
from typing import Annotated

import typer

from fhir_assets.cli.output import console, errors
from fhir_assets.deployment.views import build_views
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.dbt.package import SOURCES_FILE, build_package, write_package

app = typer.Typer(help="Write a dbt package over the tables.", no_args_is_help=True)


@app.callback()
def dbt() -> None:
    """Write a dbt package over the tables."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder of the package", metavar="[FOLDER]")] = Path("fhir_dbt"),
) -> None:
    """Write a dbt package: sources, incremental staging models, and models of OMOP 5.4 and Tuva's input layer.

    If the folder has the package already, models/sources.yml is generated again from the ViewDefinitions, and missing
    files are written. Other files are kept, and those that differ from this version's are listed.
    """
    settings = load_settings()
    view_set = build_views(settings)
    files = build_package(view_set.views, lake_url=settings.fhir_lake_url, encrypted=settings.encrypts)
    result = write_package(folder, files)
    for broken in view_set.broken:
        errors.print(f"left out: {broken.message}", markup=False, soft_wrap=True)
    for name in result.kept:
        console.print(f"kept, although it differs from this version's: {folder / name}", markup=False, soft_wrap=True)
    console.print(
        f"{folder}: {len(result.written)} of {len(files)} files written. {SOURCES_FILE} has {len(view_set.views)} "
        "tables. Next: pip install dbt-postgres, copy profiles.yml to ~/.dbt, then `dbt build`.",
        markup=False,
        soft_wrap=True,
    )
    if view_set.broken:
        raise typer.Exit(1)
