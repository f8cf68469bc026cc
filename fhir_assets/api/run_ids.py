"""Run ids in paths: the id of a run, or its first characters."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import Path

from fhir_assets.api.problems import Problem
from fhir_assets.warehouse.ops import runs
from fhir_assets.warehouse.postgres.db.connections import Connection

RunId = Annotated[str, Path(description="A run's id, or its first characters", pattern=r"^[A-Za-z0-9\-]{1,64}$")]


def find_run_id(conn: Connection, prefix: str) -> str:
    """Return the id of the run whose id begins with ``prefix``. Raises Problem (404) if no run or several match."""
    run_ids = runs.find_by_prefix(conn, prefix)
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
