"""The steps of a run that another process executes: results in any order, failures, interruptions and its death."""

from datetime import UTC, datetime

import pytest

from fhir_assets.ingestion.relay import Ended, Message, Progress, RelayedSteps, StepEnd
from fhir_assets.pipeline.fetch.step import RawUpdate
from fhir_assets.pipeline.load.result import LoadResult
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.steps.layers import FetchedType, LoadedType
from fhir_assets.steps.records import StepFailed
from fhir_assets.steps.run_context import RunContext
from fhir_assets.windows import Window, WindowRange

START = datetime(2024, 1, 1, tzinfo=UTC)
WINDOWS = WindowRange([Window(START, datetime(2024, 1, 2, tzinfo=UTC), "2024-01-01")])
RUN = RunContext("a run", WINDOWS, Refresh.MISSING, "cli", START)


def ignore(text: str) -> None:
    """Take a message about progress, and show nothing."""


def relay(*messages: Message) -> RelayedSteps:
    return RelayedSteps(iter(messages).__next__)


def fetched(name: str) -> FetchedType:
    return FetchedType(RawUpdate(name, (), {}), [], is_offered=True, deleted=None, seconds=1.5)


def test_results_are_taken_by_their_step_in_whatever_order_they_arrive() -> None:
    loaded = LoadedType(LoadResult(resources=7), 2.5)
    steps = relay(
        StepEnd(("normalized", "Patient"), loaded),
        StepEnd(("raw", "Patient"), fetched("Patient")),
        StepEnd(("raw", "Encounter"), fetched("Encounter")),
    )
    assert steps.fetch(RUN, ["Encounter", "Patient"], ignore) == {
        "Encounter": fetched("Encounter"),
        "Patient": fetched("Patient"),
    }
    assert steps.load(RUN, "Patient", ["patient"]) == loaded


def test_the_progress_of_an_export_is_reported_while_its_step_waits() -> None:
    shown: list[str] = []
    steps = relay(Progress("1 of 2"), Progress("2 of 2"), StepEnd(("raw", "Patient"), fetched("Patient")))
    steps.fetch(RUN, ["Patient"], shown.append)
    assert shown == ["1 of 2", "2 of 2"]


def test_a_step_that_failed_fails_with_the_same_reason_and_exit_code() -> None:
    steps = relay(StepEnd(("validated", "Patient"), StepFailed("the server is down", 75)))
    with pytest.raises(StepFailed) as failed:
        steps.validate(RUN, "Patient")
    assert (failed.value.reason, failed.value.exit_code) == ("the server is down", 75)


def test_an_interruption_ends_every_step_that_has_no_result() -> None:
    steps = relay(StepEnd(("raw", "Patient"), fetched("Patient")), Ended("signal 15", is_interruption=True))
    assert steps.fetch(RUN, ["Patient"], ignore)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt, match="signal 15"):
            steps.validate(RUN, "Patient")


def test_an_error_of_the_process_fails_every_step_that_has_no_result() -> None:
    steps = relay(Ended("the database is down", is_interruption=False))
    for _ in range(2):
        with pytest.raises(StepFailed, match="the database is down"):
            steps.validate(RUN, "Patient")


def test_results_of_a_run_are_not_those_of_the_next() -> None:
    steps = relay(
        StepEnd(("normalized", "Patient"), LoadedType(LoadResult(), 1)), StepEnd(("raw", "Patient"), fetched("Patient"))
    )
    assert steps.fetch(RUN, ["Patient"], ignore)
    steps.begin()
    with pytest.raises(StopIteration):
        steps.load(RUN, "Patient", ["patient"])
