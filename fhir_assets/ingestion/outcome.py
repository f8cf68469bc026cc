"""The outcomes of runs that the command line executes."""

from collections.abc import Sequence
from dataclasses import dataclass

from fhir_assets.windows import WindowRange


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one run."""

    run_id: str
    windows: WindowRange
    success: bool
    exit_code: int = 0
    """0 if the run succeeded; 78 or 75 if settings, or a later attempt, resolve all of its failures; otherwise 1."""


def choose_exit_code(codes: Sequence[int]) -> int:
    """Return the exit code of several failures: theirs if all agree, 1 if not or if there is none."""
    return codes[0] if len(set(codes)) == 1 else 1


def select_failed(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes of runs that failed."""
    return [outcome for outcome in outcomes if not outcome.success]
