"""Trying again what failed in passing: growing, jittered waits, and a server's own wish for how long to stay away."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from fhir_assets.errors import FhirAssetsError, ServerUnavailable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a call is tried, and how long it may wait in between; all times in seconds.

    ``budget`` bounds the whole call: no wait begins that would end after it.
    """

    attempts: int = 8
    first_wait: float = 0.5
    max_wait: float = 60
    max_retry_after: float = 300
    budget: float = 900

    def wait(self, failures: int, retry_after: float | None, jitter: float) -> float:
        """The wait after so many failures; ``jitter`` (0 to 1) keeps many clients from coming back at once."""
        if retry_after is not None:
            return min(retry_after, self.max_retry_after) * (1 + jitter / 10)
        return min(self.max_wait, self.first_wait * 2.0 ** (failures - 1)) * (0.5 + jitter / 2)


class TransientFailure(Exception):
    """One attempt failed in a way that the next may not.

    ``reason`` says what happened, as the middle of a sentence; ``advice`` what to do if it never works;
    ``final`` is the error that is raised then. ``attempts`` gives up earlier than the policy, where more are of
    little use.
    """

    def __init__(
        self,
        reason: str,
        *,
        advice: str = "",
        retry_after: float | None = None,
        attempts: int | None = None,
        final: type[FhirAssetsError] = ServerUnavailable,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice
        self.retry_after = retry_after
        self.attempts = attempts
        self.final = final


@dataclass(frozen=True, slots=True)
class Retrier:
    """Runs calls under a policy. ``sleep``, ``clock`` and ``jitter`` are there for tests."""

    policy: RetryPolicy = field(default_factory=RetryPolicy)
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random

    def run(self, what: str, attempt: Callable[[], T], policy: RetryPolicy | None = None) -> T:
        """What ``attempt`` returns; it raises PassingFailure where another attempt makes sense.

        Raises the failure's final error, with how often and how long ``what`` was tried, once the policy is used up.
        """
        policy = policy or self.policy
        started = self.clock()
        tried = 0
        while True:
            try:
                return attempt()
            except TransientFailure as failure:
                tried += 1
                wait = policy.wait(tried, failure.retry_after, self.jitter())
                elapsed = self.clock() - started
                attempts = min(policy.attempts, failure.attempts or policy.attempts)
                if tried >= attempts or elapsed + wait > policy.budget:
                    times = "once" if tried == 1 else f"{tried} times over {elapsed:.0f} s"
                    advice = f"; {failure.advice}" if failure.advice else ""
                    raise failure.final(f"{what}: {failure.reason} (tried {times}){advice}") from None
            self.sleep(wait)

    def wait_or_raise(self, what: str, failures: int, failure: TransientFailure) -> None:
        """For a caller with a loop of its own: wait after so many failures in a row, or raise the final error."""
        if failures >= min(self.policy.attempts, failure.attempts or self.policy.attempts):
            advice = f"; {failure.advice}" if failure.advice else ""
            raise failure.final(f"{what}: {failure.reason} (tried {failures} times){advice}") from None
        self.sleep(self.policy.wait(failures, failure.retry_after, self.jitter()))


def read_retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """The seconds that a Retry-After header asks for, given as a number or as an HTTP date; None without one
    that can be read (https://www.rfc-editor.org/rfc/rfc9110#field.retry-after).
    """
    if not value:
        return None
    try:
        return max(0.0, float(int(value)))
    except OverflowError:
        return float("inf")
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())
