"""Retries of calls that fail with a transient error: exponential waits with jitter, and support of Retry-After.

One ``Retrier`` serves every client of the project, so that all of them honour Retry-After, stay within a time budget
and stop when the program stops.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from fhir_assets.errors import FhirAssetsError, ServerUnavailable

T = TypeVar("T")

_MAX_DOUBLINGS = 60


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The number of attempts of a call and the waits between them. All times are in seconds.

    ``budget`` limits the total time: a wait that would exceed it is not begun, and the call fails.
    """

    attempts: int = 8
    first_wait: float = 0.5
    max_wait: float = 60
    max_retry_after: float = 300
    budget: float = 900

    def wait_seconds(self, failures: int, retry_after: float | None = None, jitter: float | None = None) -> float:
        """Return the wait after ``failures`` failures in a row.

        ``retry_after`` is the wait that the server asked for; it is cut to ``max_retry_after``. ``jitter`` from 0 to 1
        keeps many clients from returning at the same time; None draws a random one.
        """
        if jitter is None:
            jitter = random.random()
        if retry_after is not None:
            return min(retry_after, self.max_retry_after) * (1 + jitter / 10)
        doubled = self.first_wait * 2.0 ** min(failures - 1, _MAX_DOUBLINGS)
        return min(self.max_wait, doubled) * (0.5 + jitter / 2)


class TransientFailure(Exception):
    """An attempt failed, and another attempt may succeed.

    ``reason`` states what happened, as a clause of the error message. ``advice`` states what to do if all attempts
    fail. ``retry_after`` is the wait in seconds that the server asked for. ``attempts``, if set, replaces a higher
    limit of the policy, for failures that more attempts rarely resolve. ``final`` is the error to raise after the last
    attempt.
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
    """Runs calls under a policy.

    ``sleep`` waits for a number of seconds. If it returns True, the program is stopping and no further attempt is made;
    ``threading.Event.wait`` can be passed. ``clock`` and ``jitter`` are replaced in tests.
    """

    policy: RetryPolicy = field(default_factory=RetryPolicy)
    sleep: Callable[[float], object] = time.sleep
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random

    def run(self, description: str, attempt: Callable[[], T], policy: RetryPolicy | None = None) -> T:
        """Call ``attempt`` until it succeeds, and return its result. It raises TransientFailure to be called again.

        ``description`` names the call in messages. After the last attempt, raises the failure's final error with the
        number of attempts and the time that they took.
        """
        policy = policy or self.policy
        started = self.clock()
        failures = 0
        while True:
            try:
                return attempt()
            except TransientFailure as failure:
                failures += 1
                wait = policy.wait_seconds(failures, failure.retry_after, self.jitter())
                elapsed = self.clock() - started
                attempts = min(policy.attempts, failure.attempts or policy.attempts)
                if failures >= attempts or elapsed + wait > policy.budget or self.sleep(wait) is True:
                    times = "once" if failures == 1 else f"{failures} times over {elapsed:.0f} s"
                    raise _final_error(description, failure, times) from None

    def wait_or_raise(self, description: str, failures: int, failure: TransientFailure) -> None:
        """Wait after ``failures`` failures in a row, or raise the final error if they are too many.

        For callers with a loop of their own, whose attempts continue where the previous one ended.
        """
        attempts = min(self.policy.attempts, failure.attempts or self.policy.attempts)
        wait = self.policy.wait_seconds(failures, failure.retry_after, self.jitter())
        if failures >= attempts or self.sleep(wait) is True:
            raise _final_error(description, failure, f"{failures} times") from None


def _final_error(description: str, failure: TransientFailure, times: str) -> FhirAssetsError:
    advice = f"; {failure.advice}" if failure.advice else ""
    return failure.final(f"{description}: {failure.reason} (tried {times}){advice}")


def read_retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Return the seconds that a Retry-After header asks for, given as a number or as an HTTP date.

    Returns None if there is no header or it cannot be read (https://www.rfc-editor.org/rfc/rfc9110#field.retry-after).
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
