"""`fhir-assets missing-references`: what loaded resources refer to and the tables lack."""

from dataclasses import asdict
from typing import Annotated

import typer

from fhir_assets.cli.ingest import report_failure, summary
from fhir_assets.cli.output import console, only_our_words, print_json, print_table
from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import PermanentError
from fhir_assets.ingestion import Ingestion, select_failed
from fhir_assets.orchestration.instance import config
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.queries import references
from fhir_assets.warehouse.postgres.tables import view_tables

app = typer.Typer(help="What loaded resources refer to and the tables lack.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON")]


@app.command("list")
def list_missing(json: Json = False) -> None:
    """By type, how many references there are and how many lead to nothing that is loaded."""
    settings = load_settings()
    views = build_views(settings).views
    with Warehouse(settings).connect() as conn:
        there = view_tables.find_existing_tables(conn, views)
        columns = [c for view in views if view.name in there for c in references.find_reference_columns(view)]
        found = [asdict(each) for each in references.count_references(conn, columns, settings.fhir_resource_types)]
    if json:
        print_json(found)
    else:
        print_table("References", found, ("target", "references", "missing"))


@app.command()
def fetch(json: Json = False) -> None:
    """Ask the server for them by id, Patients first, and load what it has. What it lacks is left alone for a day."""
    settings = load_settings()
    settings.require_source()
    instance = config.open_instance(settings)
    ingestion = Ingestion(settings, build_definitions(settings), instance)
    with only_our_words():
        if not ingestion.fetch_missing_references(triggered_by="cli"):
            raise PermanentError("the run of fetch_missing_references failed: its page in the Dagster UI says why")
        outcomes = [ingestion.load_received(each, triggered_by="cli") for each in ingestion.find_received()]
    rows = summary(settings, outcomes)
    if json:
        print_json({"runs": [each.run_id for each in outcomes], "success": not select_failed(outcomes), "types": rows})
    elif rows:
        print_table("Loaded", rows, ("type", "valid", "dead", "loaded"))
    else:
        console.print("The server has nothing of what is missing.")
    for outcome in select_failed(outcomes):
        report_failure(settings, outcome)
    if select_failed(outcomes):
        raise typer.Exit(1)
