"""`fhir-assets missing-references`: list and fetch resources that loaded resources refer to but that are not loaded."""

from dataclasses import asdict
from typing import Annotated

import typer

from fhir_assets.cli.load_reports import print_summary, report_failures, summarize_runs
from fhir_assets.cli.output import console, hide_library_output, print_json, print_table
from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import PermanentError
from fhir_assets.fhir.views import find_reference_columns
from fhir_assets.ingestion.outcome import choose_exit_code, select_failed
from fhir_assets.ingestion.runs import Ingestion
from fhir_assets.orchestration.instance import config
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.queries import references
from fhir_assets.warehouse.postgres.tables import view_tables

app = typer.Typer(
    help="List and fetch resources that loaded resources refer to but that are not loaded.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON")]


@app.command("list")
def list_missing(json: Json = False) -> None:
    """List, for each target type, the number of references and the number whose target is not loaded."""
    settings = load_settings()
    views = build_views(settings).views
    with Warehouse(settings).connect() as conn:
        existing = view_tables.find_existing_tables(conn, views)
        columns = [column for view in views if view.name in existing for column in find_reference_columns(view)]
        rows = [asdict(row) for row in references.count_references(conn, columns, settings.fhir_resource_types)]
    if json:
        print_json(rows)
    else:
        print_table("References", rows, ("target", "references", "missing"))


@app.command()
def fetch(json: Json = False) -> None:
    """Fetch the missing resources from the server by id, Patients first, and load them.

    A resource that the server does not have is requested again after a day at the earliest.
    """
    settings = load_settings()
    settings.require_source()
    instance = config.open_instance(settings)
    ingestion = Ingestion(settings, build_definitions(settings), instance)
    with hide_library_output():
        failure = ingestion.fetch_missing_references(triggered_by="cli")
        outcomes = [ingestion.load_received(windows, triggered_by="cli") for windows in ingestion.find_received()]
    rows = summarize_runs(settings, outcomes)
    failures = select_failed(outcomes)
    run_ids = [outcome.run_id for outcome in outcomes]
    if json:
        print_json({"runs": run_ids, "success": not failures and failure is None, "types": rows})
    elif rows:
        print_summary("Loaded", rows)
    elif failure is None:
        console.print("The server has none of the missing resources.")
    report_failures(settings, failures)
    if failure is not None:
        raise PermanentError(f"some missing resources could not be fetched: {failure}")
    if failures:
        raise typer.Exit(choose_exit_code([outcome.exit_code for outcome in failures]))
