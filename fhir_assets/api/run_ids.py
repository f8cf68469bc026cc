"""Run ids in paths: the number of a run, its id, or the first characters of its id."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import Path

from fhir_assets.api.problems import Problem
from fhir_assets.warehouse.ops import numbers, runs, visits
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.postgres.db.connections import Connection

RunId = Annotated[
    str, Path(description="A run's number, its id, or the first characters of its id", pattern=r"^[A-Za-z0-9\-]{1,64}$")
]

_SHORT_ID = 8
"""The number of characters of an id that Dagster shows. Fewer digits are a number, never the beginning of an id."""

_MAX_DIGITS = 18
"""Longer numbers do not fit into 64 bits, so that they can only be the beginning of an id."""


LANDING = "landing:"
"""The beginning of the origins of landed and posted files."""

InputOrRunId = Annotated[
    str,
    Path(
        description="A run's number, its id, or the first characters of its id; or the origin of files of the landing "
        "zone (landing:batch-…)",
        pattern=r"^[A-Za-z0-9\-]{1,64}$|^[a-z]{1,16}:[A-Za-z0-9\-/]{1,200}$",
    ),
]


def select_dead_letters(conn: Connection, text: str) -> Selection:
    """Return the selection of the dead letters of a run, or of received files. Raises Problem (404)."""
    if text.startswith(LANDING):
        return Selection(origins=visits.find_origins(conn, text))
    return Selection(run_id=find_run_id(conn, text))


def find_run_id(conn: Connection, text: str) -> str:
    """Return the id of the run that a path means. Raises Problem (404) if no run or several match."""
    run_ids = list_matches(conn, text)
    if len(run_ids) != 1:
        raise run_not_found(run_ids)
    return run_ids[0]


def run_not_found(matches: Sequence[str]) -> Problem:
    """Return the problem for a prefix of run ids that matches no run, or several."""
    detail = (
        "several run ids begin with these characters: pass more characters of the id"
        if matches
        else "there is no such run"
    )
    return Problem(404, detail)


def list_matches(conn: Connection, text: str) -> Sequence[str]:
    """Return the ids of the runs that a path means: the run with this number, or else those whose ids begin so."""
    if text.isdigit() and len(text) <= _MAX_DIGITS:
        run_id = numbers.find_id(conn, "run", int(text))
        if run_id is not None:
            return [run_id]
        if len(text) < _SHORT_ID:
            return []
    return runs.find_by_prefix(conn, text)
