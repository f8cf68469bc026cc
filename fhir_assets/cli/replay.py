"""`fhir-assets dead-letters replay`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated
from uuid import uuid4

import typer

from fhir_assets.accounts import find_account
from fhir_assets.cli.dead_letter_options import (
    SELECTING_OPTIONS,
    Everything,
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
from fhir_assets.cli.load_reports import report_failures
from fhir_assets.cli.output import console, hide_library_output, print_json
from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.landing import build_receiver
from fhir_assets.deployment.validation import current_rulesets
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.ingestion.outcome import Outcome, choose_exit_code, select_failed
from fhir_assets.ingestion.runs import Ingestion
from fhir_assets.orchestration import replayable_windows
from fhir_assets.orchestration.instance import config
from fhir_assets.pipeline.correct.visit_rows import RowReplay, RowReplayStep
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.ops import audit_log, replays
from fhir_assets.warehouse.ops.dead_letters import Selection

_MAX_OUTDATED = 1_000_000


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
        bool,
        typer.Option(
            "--outdated", help="Only those that failed under earlier rules or views, not under the current ones"
        ),
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Replay in this process, or leave it to the Dagster daemon")
    ] = True,
    json: Json = False,
) -> None:
    """Validate dead letters again and load those that are valid now.

    The replay is done in Dagster runs of this process. Rows of visit files are received again, and loaded with
    everything else that waits. The exit code is 0 if the runs succeeded, even if dead letters
    failed again; the output has their number. It is 1 if dead letters were not replayed because another run loads
    their windows, or if an id does not exist or cannot be replayed.
    """
    settings = load_settings()
    warehouse = Warehouse(settings)
    selection = build_selection(ids, run, resource_type, stage, rule, window, since, until)
    if outdated:
        selection = _select_outdated(settings, warehouse, selection)
    elif selection == Selection() and not everything:
        raise ConfigurationError(f"select dead letters: {SELECTING_OPTIONS}, --outdated or --all")
    selection = with_full_run_id(warehouse, selection)
    audit_record = AuditRecord("replay", f"cli:{find_account()}", selection.resource_type, detail={"waited": wait})
    count = marked = _mark(settings, warehouse, selection, audit_record, wait=wait)
    rows = RowReplayStep(warehouse.connect, build_receiver(settings, warehouse)).run(
        selection, audit_record, run_id=str(uuid4())
    )
    outcomes = _run_replay(settings, selection, rows) if wait and (count or rows.received) else []
    with warehouse.connect() as conn:
        replayed = replays.count_outcome(conn, [outcome.run_id for outcome in outcomes])
    failures = select_failed(outcomes)
    pending = max(0, count - replayed.resolved - replayed.failed) if wait else 0
    count += rows.received + rows.failed
    missing = count_missing(ids, count)
    if json:
        print_json(
            {
                "dead_letters": count,
                "runs": [outcome.run_id for outcome in outcomes],
                "success": not failures,
                "resolved": replayed.resolved + rows.received,
                "failed": replayed.failed + rows.failed,
                "marked": not wait,
                "pending": pending,
                "not_found": missing,
            }
        )
    elif not count:
        console.print("No open dead letter matches: there is nothing to replay.")
    elif not wait:
        _print_requested(marked, rows)
    else:
        console.print(
            f"Of {count:,} dead letters {replayed.resolved + rows.received:,} are resolved and "
            f"{replayed.failed + rows.failed:,} failed again."
        )
        if pending and not failures:
            console.print(
                f"{pending:,} dead letters were not replayed, because another run loads their windows: replay them "
                "when it has ended."
            )
    report_failures(settings, failures)
    report_missing(missing, "can be replayed")
    if failures:
        raise typer.Exit(choose_exit_code([outcome.exit_code for outcome in failures]))
    if pending or missing:
        raise typer.Exit(1)


def _select_outdated(settings: Settings, warehouse: Warehouse, selection: Selection) -> Selection:
    """Return the selection without the dead letters that failed under the current rules and views."""
    with warehouse.connect() as conn:
        outdated = replays.find_outdated(conn, current_rulesets(settings, build_views(settings)), limit=_MAX_OUTDATED)
    if selection.ids is None:
        return replace(selection, ids=outdated)
    return replace(selection, ids=sorted(set(selection.ids).intersection(outdated)))


def _print_requested(marked: int, rows: RowReplay) -> None:
    if marked:
        console.print(f"{marked:,} dead letters are marked: the sensor replay_dead_letters replays them.")
    if rows.received:
        console.print(
            f"{rows.received:,} rows of visit files are received: the sensor load_received or the next "
            "`fhir-assets ingest` loads them."
        )
    if rows.failed:
        console.print(f"{rows.failed:,} rows of visit files failed again.")


def _mark(
    settings: Settings, warehouse: Warehouse, selection: Selection, audit_record: AuditRecord, *, wait: bool
) -> int:
    """Count the dead letters, write the audit record, and mark them for the sensor unless this process replays them."""
    with warehouse.connect() as conn:
        scope = replayable_windows.find_replayable(conn, settings, selection)
        count = sum(row.dead_letters for row in scope)
        if not wait:
            replays.request_replay(conn, selection, within=scope)
        audit_log.record(conn, replace(audit_record, count=count))
    return count


def _run_replay(settings: Settings, selection: Selection, rows: RowReplay) -> Sequence[Outcome]:
    instance = config.open_instance(settings)
    with hide_library_output():
        ingestion = Ingestion(settings, build_definitions(settings), instance)
        outcomes = ingestion.replay(selection, triggered_by="cli")
        if rows.received:
            waiting = ingestion.find_received()
            outcomes += [ingestion.load_received(windows, triggered_by="cli") for windows in waiting]
        return outcomes
