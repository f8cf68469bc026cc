"""The messages from a process that executes the steps of a load to the one that records them in Dagster.

The first sends a LoadRequest, then the result of each step. The second executes a run of Dagster whose steps are
RelayedSteps: each takes the result of the step from the messages.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fhir_assets.errors import DEFECT_EXIT_CODE
from fhir_assets.foreign_errors import was_interrupted
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.process_ends import ProcessIdentity
from fhir_assets.settings import Settings
from fhir_assets.steps.layers import FetchedType, LoadedType, ValidatedType
from fhir_assets.steps.progress import Report
from fhir_assets.steps.records import StepFailed, describe_interruption
from fhir_assets.steps.run_context import RunContext
from fhir_assets.windows import WindowRange

Layer = Literal["raw", "validated", "normalized"]

StepKey = tuple[Layer, str]
"""A layer and a resource type."""


StepResult = FetchedType | ValidatedType | LoadedType


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """The run to record: one load of the windows of some resource types."""

    settings: Settings
    run_id: str
    windows: WindowRange
    refresh: Refresh
    triggered_by: str
    resource_types: Sequence[str]
    process: ProcessIdentity
    """The process that executes the steps."""


@dataclass(frozen=True, slots=True)
class StepEnd:
    """A step has ended: its result, or why it failed."""

    key: StepKey
    result: StepResult | StepFailed


@dataclass(frozen=True, slots=True)
class Progress:
    """A message about the progress of an export."""

    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The process has ended the load early: it was interrupted, or has failed. No step will end after it."""

    reason: str
    is_interruption: bool


Message = LoadRequest | StepEnd | Progress | Ended


class RelayedSteps:
    """The steps of runs that another process executes. ``receive`` waits for its next message."""

    def __init__(self, receive: Callable[[], Message]) -> None:
        self._receive = receive
        self._results: dict[StepKey, Any] = {}
        self._ended: Ended | None = None

    def begin(self) -> None:
        """Forget the results of the last run."""
        self._results.clear()
        self._ended = None

    def fetch(self, run: RunContext, resource_types: Sequence[str], report: Report) -> Mapping[str, FetchedType]:
        """Return what was fetched of the types, and report the progress until then."""
        return {name: self._take(run, ("raw", name), report) for name in resource_types}

    def validate(self, run: RunContext, resource_type: str) -> ValidatedType:
        """Return what was validated of a type."""
        result: ValidatedType = self._take(run, ("validated", resource_type))
        return result

    def load(self, run: RunContext, resource_type: str, view_names: Sequence[str]) -> LoadedType:
        """Return what was loaded of a type, which was loaded into all of its views."""
        result: LoadedType = self._take(run, ("normalized", resource_type))
        return result

    def _take(self, run: RunContext, key: StepKey, report: Report = lambda text: None) -> Any:
        try:
            while key not in self._results and self._ended is None:
                match self._receive():
                    case StepEnd(step, result):
                        self._results[step] = result
                    case Progress(text):
                        report(text)
                    case Ended() as ended:
                        self._ended = ended
        except BaseException as error:
            if was_interrupted(error):
                raise type(error)(describe_interruption(run)) from None
            raise
        if key in self._results:
            result = self._results.pop(key)
            if isinstance(result, StepFailed):
                raise result
            return result
        assert self._ended is not None
        if self._ended.is_interruption:
            raise KeyboardInterrupt(self._ended.reason)
        raise StepFailed(self._ended.reason, DEFECT_EXIT_CODE)
