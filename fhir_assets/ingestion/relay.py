"""The messages from a process that executes the steps of a load to the one that records them in Dagster.

The first sends a LoadRequest, then the result of each step. The second executes a run of Dagster whose steps are
RelayedSteps: each takes the result of the step from the messages.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, NoReturn

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
class Interrupted:
    """The process was told to stop. No step will end after it."""

    reason: str


Message = LoadRequest | StepEnd | Progress | Interrupted


class RelayedSteps:
    """The steps of runs that another process executes.

    ``end_run`` is called if that process has ended, and does not return.
    """

    def __init__(self, messages: BinaryIO, *, end_run: Callable[[], NoReturn]) -> None:
        self._messages = messages
        self._end_run = end_run
        self._results: dict[StepKey, Any] = {}
        self._interrupted = ""

    def begin(self) -> None:
        """Forget the results of the last run."""
        self._results.clear()

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
            while key not in self._results and not self._interrupted:
                self._read(report)
        except BaseException as error:
            if was_interrupted(error):
                raise type(error)(describe_interruption(run)) from None
            raise
        if key not in self._results:
            raise KeyboardInterrupt(self._interrupted)
        result = self._results.pop(key)
        if isinstance(result, StepFailed):
            raise result
        return result

    def _read(self, report: Report) -> None:
        try:
            message = pickle.load(self._messages)
        except (OSError, EOFError, pickle.UnpicklingError):
            self._end_run()
        match message:
            case StepEnd():
                self._results[message.key] = message.result
            case Progress():
                report(message.text)
            case Interrupted():
                self._interrupted = message.reason
