"""`fhir-assets landing`: list and load the files of the landing zone."""

import shutil
import sys
from typing import Annotated
from uuid import uuid4

import typer

from fhir_assets.accounts import find_account
from fhir_assets.cli.load_reports import print_summary, report_broken_views, report_failures, summarize_runs
from fhir_assets.cli.output import console, errors, hide_library_output, print_json, print_table
from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.landing import build_landing_step, build_landing_zone
from fhir_assets.deployment.store import create_place
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.ingestion.outcome import choose_exit_code, select_failed
from fhir_assets.ingestion.runs import Ingestion
from fhir_assets.orchestration.instance import config
from fhir_assets.privacy.audit import Action, AuditRecord
from fhir_assets.settings import load_settings
from fhir_assets.storage.landing_zone import ENCRYPTED, hash_content
from fhir_assets.warehouse.ops import audit_log, landing_files, landing_reports

app = typer.Typer(help="List and load the files of the landing zone (FHIR_LANDING_URL).", no_args_is_help=True)

_COLUMNS = ("name", "size", "status", "bad", "rows", "rejected", "deleted", "skipped", "content", "found_at", "error")


@app.command("list")
def list_files(
    status: Annotated[
        str | None, typer.Option(help="Only this status: arriving, ready, loaded, failed, ignored or bad")
    ] = None,
    label: Annotated[
        str, typer.Option(help="Only names that begin so, or with encryption keys: labels, as the database has them")
    ] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Print at most this many")] = 100,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """List the files of the landing zone as of the last scan, newest first.

    A file is `ignored` if the landing zone does not read files with its suffix. It is `bad` if it could not be read, or
    if some of its dead letters are not resolved. With encryption keys, names are encrypted in the database, which has a
    label for each; a name that cannot be decrypted is printed as its label.
    """
    settings = load_settings()
    with Warehouse(settings).connect() as conn:
        zone = build_landing_zone(settings).url
        files = landing_reports.list_files(conn, zone, status=status, label=label, limit=limit)
    if json:
        print_json(files)
    else:
        print_table("Landing zone", [{**file, "skipped": sum(file["skipped"].values())} for file in files], _COLUMNS)


@app.command("init")
def create_places() -> None:
    """Create the folders or buckets of FHIR_LANDING_URL and FHIR_STORE_URL unless they exist."""
    settings = load_settings()
    build_landing_zone(settings)
    for url in (settings.fhir_landing_url, settings.store_url):
        console.print(f"{'Created' if create_place(settings, url) else 'Exists'}: {url}", markup=False, soft_wrap=True)


@app.command("cat")
def print_file(
    name: Annotated[str, typer.Argument(help="The name of a file, as `landing list` prints it")],
) -> None:
    """Print a file of the landing zone, which is patient data. Encrypted files are decrypted.

    The access is recorded in the audit log, with the beginning of the file's hash.
    """
    settings = load_settings()
    zone = build_landing_zone(settings)
    if not any(file.name == name for file in zone.files()):
        raise ConfigurationError("the landing zone has no file of this name: `fhir-assets landing list` prints them")
    sha256 = hash_content(zone, name)
    with Warehouse(settings).connect() as conn:
        action: Action = "decrypt" if name.endswith(ENCRYPTED) else "read"
        detail: dict[str, str | int | bool | None] = {"landing_file": sha256[:12]}
        audit_log.record(conn, AuditRecord(action, f"cli:{find_account()}", detail=detail))
    with zone.open(name) as stream:
        shutil.copyfileobj(stream, sys.stdout.buffer)


@app.command("load")
def load(json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON")] = False) -> None:
    """Load all files of the landing zone now, without the Dagster sensors. Every file counts as complete.

    Files that could not be read before are tried again after a waiting time, which is doubled with each attempt.

    The exit code is 0 only if all files could be read, all received resources were loaded, and every ViewDefinition is
    valid. Dead letters are not a failure: `dead-letters list` prints them, and `landing list --status bad` prints their
    files.
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
    with warehouse.connect() as conn:
        retries = landing_files.find_retries(conn, build_landing_zone(settings).url)
    instance = config.open_instance(settings)
    ingestion = Ingestion(settings, build_definitions(settings), instance)
    with hide_library_output():
        outcomes = [ingestion.load_received(waiting, triggered_by="cli") for waiting in ingestion.find_received()]
    rows = summarize_runs(settings, outcomes)
    failures = select_failed(outcomes)
    run_ids = [outcome.run_id for outcome in outcomes]
    if json:
        print_json(
            {
                **totals,
                "retries": retries.files if retries else 0,
                "retry_at": retries.next_at if retries else None,
                "runs": run_ids,
                "success": not failures,
                "types": rows,
            }
        )
    else:
        console.print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in totals.items()))
        if rows:
            print_summary("Loaded", rows)
    report_failures(settings, failures)
    if retries:
        errors.print(f"{retries}: `fhir-assets landing list --status failed` prints the reasons", soft_wrap=True)
    broken = build_views(settings).broken
    report_broken_views(broken)
    if totals["failed"] or retries or broken:
        raise typer.Exit(1)
    if failures:
        raise typer.Exit(choose_exit_code([outcome.exit_code for outcome in failures]))
