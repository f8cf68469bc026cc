"""`fhir-assets audit`: who did what to whose data, and whether the log is whole."""

from dataclasses import asdict
from typing import Annotated

import typer

from fhir_assets.cli.output import console, errors, print_json, print_table
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.ops import audit_log

app = typer.Typer(help="Who did what to whose data, and whether the log is whole.", no_args_is_help=True)

_LISTED = ("seq", "at", "actor", "action", "resource_type", "subject", "count", "run_id")


@app.command()
def verify(
    noted: Annotated[
        str | None, typer.Option(help="Number and link of an earlier verification, as 1234:9f86…: it must stand there")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Find the first record that was altered, is missing or was inserted; exit code 1 if there is one.

    Note the last number and link elsewhere and give them as --noted the next time: then not even who holds the keys
    can cut the end of the log off unseen, or write it anew.
    """
    number, _, known = (noted or "").partition(":")
    if noted and not (number.isdecimal() and known):
        raise ConfigurationError(
            "--noted takes a number and a link, as an earlier `audit verify` printed them: 1234:9f86…"
        )
    with Warehouse(load_settings()).connect() as conn:
        fault = audit_log.find_fault(conn)
        if fault is None and noted:
            fault = audit_log.check_link(conn, int(number), known)
        seq, link = audit_log.get_head(conn)
    if json:
        print_json({"records": seq, "link": link, "fault": asdict(fault) if fault else None})
    elif fault:
        errors.print(f"The audit log is not whole: {fault}.", markup=False)
    else:
        console.print(f"The audit log is whole: {seq} records, the last is {seq}:{link}.", markup=False, soft_wrap=True)
    if fault:
        raise typer.Exit(1)


@app.command("list")
def list_records(
    about: Annotated[str | None, typer.Option(help="Of this resource, such as Patient/123")] = None,
    action: Annotated[str | None, typer.Option(help="read, create, update, decrypt, export, …")] = None,
    run: Annotated[str | None, typer.Option(help="Of this run")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000)] = 50,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """The newest records first."""
    resource_type, _, resource_id = (about or "").partition("/")
    if about and not resource_id:
        raise ConfigurationError("--about takes a type and an id, such as Patient/123")
    with Warehouse(load_settings()).connect() as conn:
        subject = audit_log.hash_subject(conn, resource_type, resource_id) if about else None
        found = audit_log.find_latest(conn, limit=limit, action=action, about=subject, run_id=run)  # type: ignore[arg-type]
    rows = [{"seq": entry.seq, "at": entry.at, **asdict(entry.audit_record)} for entry in found]
    if json:
        print_json(rows)
    else:
        print_table("Audit log", rows, _LISTED)
