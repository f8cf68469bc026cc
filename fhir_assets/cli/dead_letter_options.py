"""Options of `fhir-assets dead-letters` that select dead letters."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated

import typer

from fhir_assets.cli.output import errors
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.warehouse.ops import runs, visits
from fhir_assets.warehouse.ops.dead_letters import Selection

SELECTING_OPTIONS = "ids, --run, --type, --stage, --rule, --window, --since"

Id = Annotated[int, typer.Argument(metavar="ID", help="A dead letter's id, as `dead-letters list` prints it")]
Ids = Annotated[
    list[int] | None, typer.Argument(metavar="[ID]...", help="Ids of dead letters; or select them by options")
]
Run = Annotated[
    str | None,
    typer.Option("--run", help="Only if the first or last failure is in this run (its id or first characters)"),
]
Type = Annotated[str | None, typer.Option("--type", help="Only this resource type")]
Stage = Annotated[str | None, typer.Option(help="Only this stage: fetch, validate, transform or load")]
Rule = Annotated[str | None, typer.Option(help="Only this rule, such as required-binding or invariant:obs-6")]
Window = Annotated[
    list[str] | None, typer.Option("--window", help="Only this partition, such as 2024-01-05; repeatable")
]
Since = Annotated[datetime | None, typer.Option(help="Only if the last failure is at this time (UTC) or later")]
Until = Annotated[datetime | None, typer.Option(help="Only if the last failure is before this time (UTC)")]
Everything = Annotated[bool, typer.Option("--all", help="All open dead letters")]
By = Annotated[str | None, typer.Option("--by", help="The person who decides; default: the account of this process")]
Json = Annotated[bool, typer.Option("--json", help="Print as JSON")]


def build_selection(
    ids: list[int] | None,
    run: str | None,
    resource_type: str | None,
    stage: str | None,
    rule: str | None,
    window: list[str] | None,
    since: datetime | None,
    until: datetime | None,
) -> Selection:
    """Return the selection of the options. Times without a time zone are UTC."""
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


def with_full_run_id(warehouse: Warehouse, selection: Selection) -> Selection:
    """Return the selection with the complete id of its run, or with the origins of files in place of a run.

    Raises ConfigurationError if several runs match.
    """
    if selection.run_id is None:
        return selection
    with warehouse.connect_read_only() as conn:
        if selection.run_id.startswith("landing:"):
            return replace(selection, run_id=None, origins=visits.find_origins(conn, selection.run_id))
        run_ids = runs.find_by_prefix(conn, selection.run_id)
    if len(run_ids) > 1:
        raise ConfigurationError(f"several run ids begin with {selection.run_id}: pass more characters of the id")
    return replace(selection, run_id=run_ids[0]) if run_ids else selection


def count_missing(ids: list[int] | None, count: int) -> int:
    """Return how many of the given ids are not among the ``count`` selected dead letters."""
    return max(0, len(set(ids)) - count) if ids else 0


def report_missing(missing: int, condition: str) -> None:
    """Print how many ids were skipped because no dead letter with the id meets the condition."""
    if missing:
        errors.print(
            f"{missing:,} of the ids do not belong to dead letters that {condition}: "
            "`fhir-assets dead-letters list --status all` prints the ids with their status and stage",
            soft_wrap=True,
        )


def _utc(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment and moment.tzinfo is None else moment
