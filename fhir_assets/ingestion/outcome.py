"""The loads of the command line: their interface, their progress and their outcomes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.windows import WindowRange


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one run."""

    run_id: str
    windows: WindowRange
    success: bool
    exit_code: int = 0
    """0 if the run succeeded; 78 or 75 if settings, or a later attempt, resolve all of its failures; otherwise 1."""


class LoadListener(Protocol):
    """Receives the progress of a load."""

    def begin_step(self, name: str) -> None:
        """Called when a step begins."""
        ...

    def end_step(self) -> None:
        """Called when a step has succeeded or failed."""
        ...

    def show(self, text: str) -> None:
        """Called with a message about the progress of an export."""
        ...


class Loads(Protocol):
    """Executes loads of windows, one run each."""

    def count_steps(self) -> int:
        """Return the number of steps of a load."""
        ...

    def load_due(
        self,
        windows: WindowRange,
        *,
        refresh: Refresh,
        triggered_by: str,
        resource_types: Sequence[str],
        listener: LoadListener,
    ) -> Outcome:
        """Load the types of the windows in one run. Raises DatabaseUnavailable if the database is lost."""
        ...


def choose_exit_code(codes: Sequence[int]) -> int:
    """Return the exit code of several failures: theirs if all agree, 1 if not or if there is none."""
    return codes[0] if len(set(codes)) == 1 else 1


def select_failed(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes of runs that failed."""
    return [outcome for outcome in outcomes if not outcome.success]
