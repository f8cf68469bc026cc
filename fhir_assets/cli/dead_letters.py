"""`fhir-assets dead-letters`: resources that failed, with their reasons; list, correct, replay or discard them."""

from dataclasses import asdict, replace
from typing import Annotated

import typer

from fhir_assets.accounts import find_account
from fhir_assets.cli.dead_letter_options import (
    SELECTING_OPTIONS,
    By,
    Everything,
    Id,
    Ids,
    Json,
    Rule,
    Run,
    Since,
    Stage,
    Type,
    Until,
    Window,
    build_selection,
    count_missing,
    report_missing,
    with_full_run_id,
)
from fhir_assets.cli.lazy_commands import CommandSource, build_group
from fhir_assets.cli.output import console, print_json, print_table
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.privacy.audit import Action, AuditRecord
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.ops import audit_log, corrections, dead_letters, replays
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.postgres.db.connections import cipher_of

_HEAVY_COMMANDS = {
    "edit": CommandSource(
        "fhir_assets.cli.correct",
        "edit",
        "Correct the resource of a dead letter. The original is kept, with the person and the time of the correction.",
    ),
    "replay": CommandSource(
        "fhir_assets.cli.replay", "replay", "Validate dead letters again and load those that are valid now."
    ),
}

app = typer.Typer(
    cls=build_group(_HEAVY_COMMANDS),
    help="List, correct, replay or discard resources that failed.",
    no_args_is_help=True,
)

_COLUMNS = ("id", "resource_type", "stage", "rule", "path", "partition_key", "status", "attempts", "last_failure")

Status = Annotated[str | None, typer.Option(help="Only this status: open, replaying, resolved, discarded; or all")]


@app.command("list")
def list_dead_letters(
    run: Run = None,
    resource_type: Type = None,
    stage: Stage = None,
    rule: Rule = None,
    window: Window = None,
    since: Since = None,
    until: Until = None,
    status: Status = "open",
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Print at most this many")] = 50,
    json: Json = False,
) -> None:
    """List dead letters, the latest failures first."""
    selection = build_selection(None, run, resource_type, stage, rule, window, since, until)
    warehouse = Warehouse(load_settings())
    with warehouse.connect_read_only() as conn:
        selection = with_full_run_id(warehouse, replace(selection, status=None if status == "all" else status))
        rows = [asdict(dead_letter) for dead_letter in dead_letters.find(conn, selection, limit=limit)]
    if json:
        print_json(rows)
    else:
        print_table("Dead letters", rows, _COLUMNS)


@app.command()
def show(
    dead_letter_id: Id,
    resource: Annotated[
        bool, typer.Option("--resource", help="Also print the resource, which is patient data")
    ] = False,
    json: Json = False,
) -> None:
    """Show one dead letter with all of its issues."""
    with Warehouse(load_settings()).connect() as conn:
        stored = dead_letters.get(conn, dead_letter_id)
        if stored is None:
            raise ConfigurationError(
                f"there is no dead letter {dead_letter_id}: `fhir-assets dead-letters list` prints the existing ones"
            )
        dead_letter, issues = stored
        correction = corrections.get(conn, dead_letter_id)
        facts: dict[str, object] = asdict(dead_letter)
        if correction:
            facts |= {"corrected_by": correction.corrected_by, "corrected_at": correction.corrected_at}
        if resource:
            facts["resource"] = _decode(dead_letters.read_resource(conn, dead_letter_id))
            if correction:
                facts["corrected_resource"] = _decode(correction.resource)
            subject = audit_log.hash_subject(conn, dead_letter.resource_type, dead_letter.resource_id or "")
            action: Action = "decrypt" if cipher_of(conn).encrypts else "read"
            audit_record = AuditRecord(
                action,
                f"cli:{find_account()}",
                dead_letter.resource_type,
                subject,
                detail={"dead_letter": dead_letter_id},
            )
            audit_log.record(conn, audit_record)
    if json:
        print_json({**facts, "issues": issues})
        return
    for name, value in facts.items():
        console.print(f"{name.replace('_', ' '):>18}  {value}", markup=False, soft_wrap=True)
    if issues:
        print_table("Issues", issues, ("severity", "rule", "path", "message"))


@app.command()
def discard(
    reason: Annotated[str, typer.Option(help="Why the dead letters will not be corrected")],
    ids: Ids = None,
    run: Run = None,
    resource_type: Type = None,
    stage: Stage = None,
    rule: Rule = None,
    window: Window = None,
    since: Since = None,
    until: Until = None,
    everything: Everything = False,
    by: By = None,
    json: Json = False,
) -> None:
    """Discard dead letters. They stay in the table but no longer count as open; a replay by id reopens them.

    The exit code is 1 if an id is not that of an open dead letter.
    """
    selection = build_selection(ids, run, resource_type, stage, rule, window, since, until)
    if selection == Selection() and not everything:
        raise ConfigurationError(f"select dead letters: {SELECTING_OPTIONS} or --all")
    warehouse = Warehouse(load_settings())
    selection = with_full_run_id(warehouse, selection)
    account = find_account()
    with warehouse.connect() as conn:
        count = replays.discard(conn, selection, reason=reason, by=by or account)
        audit_record = AuditRecord("discard", f"cli:{account}", selection.resource_type, count=count, claim=by)
        audit_log.record(conn, audit_record)
    missing = count_missing(ids, count)
    if json:
        print_json({"discarded": count, "not_found": missing})
    else:
        console.print(f"{count:,} dead letters are discarded.")
    report_missing(missing, "are open")
    if missing:
        raise typer.Exit(1)


def _decode(body: bytes | None) -> str | None:
    return None if body is None else body.decode("utf-8", "backslashreplace")
