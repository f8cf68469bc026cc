"""`fhir-assets landing`: the files that were put into the landing zone."""

from typing import Annotated
from uuid import uuid4

import typer

from fhir_assets.cli.ingest import SUMMARY, report_failure, summary
from fhir_assets.cli.output import console, errors, only_our_words, print_json, print_table
from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.landing import build_landing_step, build_landing_zone
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.ingestion import Ingestion, select_failed
from fhir_assets.orchestration.instance import config
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.ops import landing_files

app = typer.Typer(help="Files of the landing zone (FHIR_LANDING_URL).", no_args_is_help=True)

_LISTED = ("name", "size", "status", "bad", "rows", "rejected", "deleted", "skipped", "content", "found_at", "error")


@app.command("list")
def list_files(
    status: Annotated[str | None, typer.Option(help="arriving, ready, loaded, failed or bad")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 100,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """The files of the zone as they were last seen, newest first. `bad`: unreadable, or with unsettled dead letters."""
    settings = load_settings()
    with Warehouse(settings).connect() as conn:
        found = landing_files.list_files(conn, build_landing_zone(settings).url, status=status, limit=limit)
    if json:
        print_json(found)
    else:
        print_table("Landing zone", [{**each, "skipped": sum(each["skipped"].values())} for each in found], _LISTED)


@app.command("load")
def load(json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON")] = False) -> None:
    """Load every file of the zone now, taking each as complete; without the UI and its sensors.

    Ends with 0 only if all files could be read and all that was received is in the tables. Dead letters are no
    failure: they are listed by `dead-letters list`, and their files by `landing list --status bad`.
    """
    settings = load_settings()
    warehouse = Warehouse(settings)
    landing = build_landing_step(settings, warehouse)
    landing.scan(assume_complete=True)
    totals: dict[str, int] = {"files": 0, "failed": 0, "known_before": 0, "rows": 0, "rejected": 0, "deleted": 0}
    while True:
        landed = landing.run(str(uuid4()))
        for name in totals:
            totals[name] += getattr(landed, name)
        if not landed.files:
            break
    instance = config.open_instance(settings)
    ingestion = Ingestion(settings, build_definitions(settings), instance)
    with only_our_words():
        outcomes = [ingestion.load_received(waiting, triggered_by="cli") for waiting in ingestion.find_received()]
    rows = summary(settings, outcomes)
    if json:
        print_json(
            {**totals, "runs": [o.run_id for o in outcomes], "success": not select_failed(outcomes), "types": rows}
        )
    else:
        console.print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in totals.items()))
        if rows:
            print_table("Loaded", rows, SUMMARY)
    for outcome in select_failed(outcomes):
        report_failure(settings, outcome)
    if totals["failed"]:
        errors.print("Files could not be read: `fhir-assets landing list --status failed` says which and why")
    if select_failed(outcomes) or totals["failed"]:
        raise typer.Exit(1)
