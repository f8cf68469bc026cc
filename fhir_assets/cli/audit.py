"""`fhir-assets audit`: list the audit log and verify that it is complete and unaltered."""

from dataclasses import asdict
from typing import Annotated

import typer

from fhir_assets.cli.output import console, errors, print_json, print_table
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.ops import audit_log

app = typer.Typer(
    help="List the audit log of accesses to patient data, and verify that it is unaltered.", no_args_is_help=True
)

_COLUMNS = ("seq", "at", "actor", "action", "resource_type", "subject", "count", "run_id")


@app.command()
def verify(
    noted: Annotated[
        str | None, typer.Option(help="Number and hash that an earlier verification printed, such as 1234:9f86…")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Find the first record that was altered, removed or inserted. The exit code is 1 if there is one.

    Store the printed number and hash outside of this system and pass them as --noted the next time. This also detects a
    log that was truncated or rewritten by a person who has the keys.
    """
    number, _, noted_link = (noted or "").partition(":")
    if noted and not (number.isdecimal() and noted_link):
        raise ConfigurationError(
            "--noted takes a number and a hash, as an earlier `audit verify` printed them: 1234:9f86…"
        )
    with Warehouse(load_settings()).connect() as conn:
        fault = audit_log.find_fault(conn)
        if fault is None and noted:
            fault = audit_log.check_link(conn, int(number), noted_link)
        seq, link = audit_log.get_head(conn)
    if json:
        print_json({"records": seq, "link": link, "fault": asdict(fault) if fault else None})
    elif fault:
        errors.print(f"The audit log was altered: {fault}.", markup=False)
    else:
        console.print(
            f"The audit log is unaltered: {seq} records, the last is {seq}:{link}.", markup=False, soft_wrap=True
        )
    if fault:
        raise typer.Exit(1)


@app.command("list")
def list_records(
    about: Annotated[str | None, typer.Option(help="Only records about this resource, such as Patient/123")] = None,
    action: Annotated[
        str | None, typer.Option(help="Only this action: read, create, update, decrypt, export, …")
    ] = None,
    run: Annotated[str | None, typer.Option(help="Only records of this run")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Print at most this many")] = 50,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """List records, newest first."""
    resource_type, _, resource_id = (about or "").partition("/")
    if about and not resource_id:
        raise ConfigurationError("--about takes a type and an id, such as Patient/123")
    with Warehouse(load_settings()).connect() as conn:
        subject = audit_log.hash_subject(conn, resource_type, resource_id) if about else None
        entries = audit_log.find_latest(conn, limit=limit, action=action, about=subject, run_id=run)
    rows = [{"seq": entry.seq, "at": entry.at, **asdict(entry.audit_record)} for entry in entries]
    if json:
        print_json(rows)
    else:
        print_table("Audit log", rows, _COLUMNS)
