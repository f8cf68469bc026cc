"""`fhir-assets audit`: list the audit log and verify that it is complete and unaltered."""

from dataclasses import asdict
from typing import Annotated

import typer

from fhir_assets.accounts import find_account
from fhir_assets.cli.output import console, errors, print_json, print_table
from fhir_assets.deployment.audit_marks import find_mark_fault, open_marks
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.privacy.audit import AuditRecord, Fault
from fhir_assets.privacy.audit_mark import Mark
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.ops import audit_log
from fhir_assets.warehouse.postgres.db.connections import Session

app = typer.Typer(
    help="List the audit log of accesses to patient data, and verify that it is unaltered.", no_args_is_help=True
)

_COLUMNS = (
    "seq",
    "at",
    "actor",
    "database_user",
    "account",
    "claim",
    "action",
    "resource_type",
    "subject",
    "count",
    "run_id",
)


@app.command()
def verify(
    noted: Annotated[
        str | None, typer.Option(help="Number and hash that an earlier verification printed, such as 1234:9f86…")
    ] = None,
    with_mark: Annotated[
        bool, typer.Option("--mark/--no-mark", help="Compare the log with its mark in the store, audit.json")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Find the first record that was altered, removed or inserted. The exit code is 1 if there is one.

    The mark in the store shows a log that lost its end. Store the printed number and hash outside of this system and
    pass them as --noted the next time: this also detects a log that was truncated or rewritten by a person who has the
    keys and may write to the store.
    """
    number, _, noted_link = (noted or "").partition(":")
    if noted and not (number.isdecimal() and noted_link):
        raise ConfigurationError(
            "--noted takes a number and a hash, as an earlier `audit verify` printed them: 1234:9f86…"
        )
    settings = load_settings()
    with Warehouse(settings).connect() as conn:
        mark = open_marks(settings).read(conn) if with_mark else None
        fault = audit_log.find_fault(conn)
        if fault is None and noted:
            fault = audit_log.check_link(conn, int(number), noted_link)
        contradicted = fault is None and with_mark
        if contradicted:
            fault = find_mark_fault(conn, mark)
        seq, link = audit_log.get_head(conn)
    if json:
        vouched = {"seq": mark.seq, "at": mark.at, "losses": len(mark.losses)} if mark else None
        print_json({"records": seq, "link": link, "fault": asdict(fault) if fault else None, "mark": vouched})
    elif fault:
        errors.print(_describe(fault, mark if contradicted else None), markup=False, soft_wrap=True)
    else:
        console.print(
            f"The audit log is unaltered: {seq} records, the last is {seq}:{link}. {_describe_mark(mark)}",
            markup=False,
            soft_wrap=True,
        )
    if fault:
        raise typer.Exit(1)


def _describe(fault: Fault, mark: Mark | None) -> str:
    """Return the message of a fault. ``mark`` is the mark that the log contradicts."""
    text = f"The audit log was altered: {fault}."
    if mark and fault.what != "mark altered":
        text += (
            f" The mark in the store vouches for {mark.seq} records until {mark.at:%Y-%m-%d %H:%M:%S}: either the log "
            "was cut, or the database lost its last records in a crash or was restored from a backup. If the loss is "
            "explained, run `fhir-assets audit accept --reason …`."
        )
    return text


def _describe_mark(mark: Mark | None) -> str:
    if mark is None:
        return "No mark in the store vouches for its end."
    accepted = f" Accepted losses: {len(mark.losses)}." if mark.losses else ""
    return f"The mark in the store vouches for {mark.seq} of them, until {mark.at:%Y-%m-%d %H:%M:%S}.{accepted}"


@app.command()
def accept(
    reason: Annotated[str, typer.Option(help="Why the log differs from its mark, such as a restored backup")],
) -> None:
    """Accept that the log has lost its end, for example after a backup was restored, and let the mark start anew.

    The log must be one chain. An audit record states who accepted the loss, and the mark keeps what it vouched for.
    """
    settings = load_settings()
    marks = open_marks(settings)
    with Warehouse(settings).connect() as conn:
        if fault := audit_log.find_fault(conn):
            raise ConfigurationError(f"{fault}: this is no lost end. Restore the log from a backup")
        mark = marks.read(conn)
        if find_mark_fault(conn, mark) is None:
            raise ConfigurationError("the audit log agrees with its mark: there is nothing to accept")
        _record_acceptance(conn, mark, reason)
        marks.accept(conn)
    console.print("The loss is accepted, and recorded: `fhir-assets audit verify` compares with the new mark.")


def _record_acceptance(conn: Session, mark: Mark | None, reason: str) -> None:
    detail: dict[str, str | int | bool | None] = {"reason": reason[:200]}
    if mark:
        detail |= {"marked": mark.seq, "link": mark.link[:16]}
    audit_log.record(conn, AuditRecord("accept a loss", f"cli:{find_account()}", detail=detail))
    conn.commit()


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
    rows = [
        {
            "seq": entry.seq,
            "at": entry.at,
            **asdict(entry.audit_record),
            "database_user": entry.writer and entry.writer.database_user,
            "account": entry.writer and entry.writer.account,
        }
        for entry in entries
    ]
    if json:
        print_json(rows)
    else:
        print_table("Audit log", rows, _COLUMNS)
