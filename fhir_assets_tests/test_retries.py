"""Retries: how often, how long, and when they end."""

from threading import Event

import pytest

from fhir_assets.errors import NotFhir, ServerUnavailable
from fhir_assets.retries import Retrier, RetryPolicy, TransientFailure


def test_a_call_that_succeeds_at_the_second_attempt_returns_its_result() -> None:
    waits: list[float] = []
    attempts = iter([TransientFailure("busy"), "result"])

    def attempt() -> str:
        outcome = next(attempts)
        if isinstance(outcome, TransientFailure):
            raise outcome
        return str(outcome)

    assert Retrier(RetryPolicy(first_wait=2), waits.append, jitter=lambda: 1).run("GET x", attempt) == "result"
    assert waits == [2]


def test_the_final_error_names_the_call_the_reason_and_the_advice() -> None:
    def attempt() -> None:
        raise TransientFailure("the answer is empty", advice="is the server up?", final=NotFhir)

    with pytest.raises(NotFhir, match=r"GET x: the answer is empty \(tried 2 times over 0 s\); is the server up\?"):
        Retrier(RetryPolicy(attempts=2), lambda seconds: None, clock=lambda: 0).run("GET x", attempt)


@pytest.mark.parametrize("failures", [1, 100, 10_000])
def test_a_wait_never_exceeds_the_longest_however_many_failures_there_were(failures: int) -> None:
    assert 0 < RetryPolicy(first_wait=0.5, max_wait=60).wait_seconds(failures) <= 60


def test_a_program_that_stops_makes_no_further_attempt() -> None:
    stop = Event()
    attempts = 0

    def attempt() -> None:
        nonlocal attempts
        attempts += 1
        stop.set()
        raise TransientFailure("busy")

    retrier = Retrier(RetryPolicy(attempts=8, first_wait=60), stop.wait)
    with pytest.raises(ServerUnavailable, match="tried once"):
        retrier.run("GET x", attempt)
    assert attempts == 1
    with pytest.raises(ServerUnavailable, match="busy"):
        retrier.wait_or_raise("GET x", 1, TransientFailure("busy"))
