"""`fhir-assets dead-letters`: what could not go on, and why; corrected, replayed or discarded."""

import getpass
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fhir_assets.cli.ingest import report_failure
from fhir_assets.cli.output import console, only_our_words, print_json, print_table
from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.encryption import build_store_cipher
from fhir_assets.deployment.validation import build_validator, current_rulesets
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.ingestion import Ingestion, Outcome, select_failed
from fhir_assets.orchestration.instance import config
from fhir_assets.pipeline.correct.step import Correction, CorrectionStep
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.privacy.audit import Action, AuditRecord
from fhir_assets.settings import Settings, load_settings
from fhir_assets.storage.store import open_store
from fhir_assets.warehouse.ops import audit_log, corrections, dead_letters, replays, runs
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.postgres.db.connections import cipher_of

app = typer.Typer(help="Resources that could not go on, each with its reason.", no_args_is_help=True)

_LISTED = ("id", "resource_type", "stage", "rule", "path", "partition_key", "status", "attempts", "last_failure")
_SAY_WHICH = "say which: ids, --run, --type, --stage, --rule, --window, --since"
_OUTDATED_AT_ONCE = 1_000_000

Ids = Annotated[list[int] | None, typer.Argument(metavar="[ID]...", help="Dead letters by id; or choose by options")]
Run = Annotated[str | None, typer.Option("--run", help="Failed in this run, first or last; its first characters do")]
Type = Annotated[str | None, typer.Option("--type", help="Resource type")]
Stage = Annotated[str | None, typer.Option(help="fetch, validate, transform or load")]
Rule = Annotated[str | None, typer.Option(help="Such as required-binding or invariant:obs-6")]
Window = Annotated[list[str] | None, typer.Option("--window", help="Partition, such as 2024-01-05; repeatable")]
Since = Annotated[datetime | None, typer.Option(help="Failed last at this time or later, UTC")]
Until = Annotated[datetime | None, typer.Option(help="Failed last before this time, UTC")]
Status = Annotated[str | None, typer.Option(help="open, replaying, resolved, discarded; or all")]
Everything = Annotated[bool, typer.Option("--all", help="All open dead letters")]
By = Annotated[str | None, typer.Option("--by", help="Who decides so; the user of this machine if unset")]
Json = Annotated[bool, typer.Option("--json", help="Print as JSON")]


@app.command("list")
def list_letters(
    run: Run = None,
    resource_type: Type = None,
    stage: Stage = None,
    rule: Rule = None,
    window: Window = None,
    since: Since = None,
    until: Until = None,
    status: Status = "open",
    limit: Annotated[int, typer.Option(min=1, max=100_000)] = 50,
    json: Json = False,
) -> None:
    """The dead letters that match, those that failed last first."""
    chosen = _selection(None, run, resource_type, stage, rule, window, since, until)
    warehouse = Warehouse(load_settings())
    with warehouse.connect_read_only() as conn:
        chosen = _whole_run(warehouse, replace(chosen, status=None if status == "all" else status))
        found = [asdict(letter) for letter in dead_letters.find(conn, chosen, limit=limit)]
    if json:
        print_json(found)
    else:
        print_table("Dead letters", found, _LISTED)


@app.command()
def show(
    letter: Annotated[int, typer.Argument(metavar="ID")],
    resource: Annotated[bool, typer.Option("--resource", help="Also print the resource itself: patient data")] = False,
    json: Json = False,
) -> None:
    """One dead letter with all of its issues."""
    with Warehouse(load_settings()).connect() as conn:
        stored = dead_letters.get(conn, letter)
        if stored is None:
            raise ConfigurationError(
                f"there is no dead letter {letter}: `fhir-assets dead-letters list` shows what there is"
            )
        facts, issues = stored
        correction = corrections.get(conn, letter)
        found: dict[str, object] = asdict(facts)
        if correction:
            found |= {"corrected_by": correction.corrected_by, "corrected_at": correction.corrected_at}
        if resource:
            found["resource"] = _text(dead_letters.read_resource(conn, letter))
            if correction:
                found["corrected_resource"] = _text(correction.resource)
            subject = audit_log.hash_subject(conn, facts.resource_type, facts.resource_id or "")
            action: Action = "decrypt" if cipher_of(conn).on else "read"
            audit_record = AuditRecord(
                action, f"cli:{getpass.getuser()}", facts.resource_type, subject, detail={"dead_letter": letter}
            )
            audit_log.record(conn, audit_record)
    if json:
        print_json({**found, "issues": issues})
        return
    for name, value in found.items():
        console.print(f"{name.replace('_', ' '):>18}  {value}", markup=False, soft_wrap=True)
    if issues:
        print_table("Issues", issues, ("severity", "rule", "path", "message"))


@app.command()
def edit(
    letter: Annotated[int, typer.Argument(metavar="ID")],
    patch: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A JSON Patch (RFC 6902)")] = None,
    resource: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="The whole resource")] = None,
    by: By = None,
    json: Json = False,
) -> None:
    """Correct the resource of a dead letter. The original is kept, and who corrected it when.

    The correction takes the original's place whenever that is judged again: in a replay, and when its window is
    materialized anew.
    """
    if (patch is None) == (resource is None):
        raise ConfigurationError("give either --patch FILE (a JSON Patch) or --resource FILE (the whole resource)")
    settings = load_settings()
    warehouse = Warehouse(settings)
    receiver = Receiver(
        open_store(settings.store_url, build_store_cipher(settings)),
        warehouse.connect,
        settings.window_scheme,
        settings.fhir_resource_types,
    )
    correcting = CorrectionStep(warehouse.connect, build_validator(settings), receiver)
    change = Correction(
        patch.read_bytes() if patch else None, resource.read_bytes() if resource else None, by or getpass.getuser()
    )
    corrected = correcting.run(letter, change)
    received = corrected.stage == "fetch"
    if json:
        print_json({"id": letter, "corrected_by": change.by, "received": received})
    elif received:
        console.print("Kept, and received: the sensor load_received loads it, or the next `fhir-assets ingest`.")
    else:
        console.print(f"Kept. Replay it: fhir-assets dead-letters replay {letter}")


@app.command()
def replay(
    ids: Ids = None,
    run: Run = None,
    resource_type: Type = None,
    stage: Stage = None,
    rule: Rule = None,
    window: Window = None,
    since: Since = None,
    until: Until = None,
    everything: Everything = False,
    outdated: Annotated[
        bool, typer.Option("--outdated", help="Those that failed under earlier rules or views than the present ones")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Replay here and now, or leave it to the daemon")
    ] = True,
    json: Json = False,
) -> None:
    """Judge dead letters again, and load what heals: in Dagster runs of their own, in this process.

    Ends with 0 if the runs went well, also when letters failed again; --json says how many.
    """
    settings = load_settings()
    warehouse = Warehouse(settings)
    chosen = _selection(ids, run, resource_type, stage, rule, window, since, until)
    if outdated:
        with warehouse.connect() as conn:
            found = replays.find_outdated(
                conn, current_rulesets(settings, build_views(settings)), limit=_OUTDATED_AT_ONCE
            )
        chosen = replace(chosen, ids=found if ids is None else sorted(set(ids).intersection(found)))
    elif chosen == Selection() and not everything:
        raise ConfigurationError(
            "say which: ids, --run, --type, --stage, --rule, --window, --since, --outdated or --all"
        )
    chosen = _whole_run(warehouse, chosen)
    with warehouse.connect() as conn:
        letters = sum(each.dead_letters for each in replays.find_replayable(conn, chosen))
        if not wait:
            replays.request_replay(conn, chosen)
        audit_record = AuditRecord(
            "replay", f"cli:{getpass.getuser()}", chosen.resource_type, count=letters, detail={"waited": wait}
        )
        audit_log.record(conn, audit_record)
    outcomes = _replay(settings, chosen) if wait and letters else []
    with warehouse.connect() as conn:
        came = replays.count_outcome(conn, [outcome.run_id for outcome in outcomes])
    broken = select_failed(outcomes)
    if json:
        facts = {"letters": letters, "runs": [outcome.run_id for outcome in outcomes], "success": not broken}
        print_json({**facts, **asdict(came), "marked": not wait})
    elif not letters:
        console.print("No open dead letter matches: nothing to replay.")
    elif not wait:
        console.print(f"{letters:,} dead letters are marked: the sensor replay_dead_letters replays them.")
    else:
        console.print(f"Of {letters:,} dead letters {came.resolved:,} resolved and {came.failed:,} failed again.")
        rest = letters - came.resolved - came.failed
        if rest > 0 and not broken:
            console.print(f"{rest:,} wait for a load of their window that is on its way: replay them again.")
    for outcome in broken:
        report_failure(settings, outcome)
    if broken:
        raise typer.Exit(1)


@app.command()
def discard(
    reason: Annotated[str, typer.Option(help="Why they are not going to be mended")],
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
    """Give up dead letters: they stay, but count no more. Replaying them by id takes it back."""
    chosen = _selection(ids, run, resource_type, stage, rule, window, since, until)
    if chosen == Selection() and not everything:
        raise ConfigurationError(f"{_SAY_WHICH} or --all")
    warehouse = Warehouse(load_settings())
    chosen = _whole_run(warehouse, chosen)
    with warehouse.connect() as conn:
        count = replays.discard(conn, chosen, reason=reason, by=by or getpass.getuser())
        audit_log.record(
            conn, AuditRecord("discard", f"cli:{by or getpass.getuser()}", chosen.resource_type, count=count)
        )
    if json:
        print_json({"discarded": count})
    else:
        console.print(f"{count:,} dead letters are discarded.")


def _replay(settings: Settings, chosen: Selection) -> Sequence[Outcome]:
    instance = config.open_instance(settings)
    with only_our_words():
        return Ingestion(settings, build_definitions(settings), instance).replay(chosen, triggered_by="cli")


def _selection(
    ids: list[int] | None,
    run: str | None,
    resource_type: str | None,
    stage: str | None,
    rule: str | None,
    window: list[str] | None,
    since: datetime | None,
    until: datetime | None,
) -> Selection:
    return Selection(
        ids=ids or None,
        run_id=run,
        resource_type=resource_type,
        stage=stage,
        rule=rule,
        partition_keys=window or None,
        since=_utc(since),
        until=_utc(until),
    )


def _whole_run(warehouse: Warehouse, chosen: Selection) -> Selection:
    """The selection with the whole id of its run. Raises ConfigurationError if several begin so."""
    if chosen.run_id is None:
        return chosen
    with warehouse.connect_read_only() as conn:
        found = runs.find_by_prefix(conn, chosen.run_id)
    if len(found) > 1:
        raise ConfigurationError(f"several runs begin with {chosen.run_id}: give more of the id")
    return replace(chosen, run_id=found[0]) if found else chosen


def _utc(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment and moment.tzinfo is None else moment


def _text(body: bytes | None) -> str | None:
    return None if body is None else body.decode("utf-8", "backslashreplace")
