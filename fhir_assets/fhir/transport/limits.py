"""The limits of an answer of a server: a total time and a number of bytes, for its headers and its body.

The timeout of a socket limits the wait for the next byte, so that a server that sends a byte now and then could occupy
a run forever. These limits hold for every answer that the project reads over HTTP; ``connections`` enforces them.
"""

import time
from dataclasses import dataclass

from fhir_assets.errors import NotFhir
from fhir_assets.retries import TransientFailure

DEFAULT_BYTES = 96 * 2**20
ANSWER_TIMEOUTS = 10
"""By default an answer may take this many times the timeout of its connection."""
_STALL_BYTES = 1 << 16
"""A large answer must bring at least this much in ``stall_seconds``."""

_SLOW_ATTEMPTS = 2


class LimitExceeded(TransientFailure):
    """An answer is larger than its limit, or takes longer."""


class AnswerTooSlow(LimitExceeded):
    """An answer takes longer than its limit. Another attempt may be faster, but each takes as long as the limit."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, attempts=_SLOW_ATTEMPTS)


class AnswerTooLarge(LimitExceeded):
    """An answer is larger than its limit. Another attempt would be, too."""

    def __init__(self, reason: str, *, advice: str = "") -> None:
        super().__init__(reason, advice=advice, attempts=1, final=NotFhir)


@dataclass(frozen=True, slots=True)
class AnswerLimits:
    """The limits of one answer.

    ``seconds`` is the time that may be spent on waiting for the server, from the connection to the last byte. ``bytes``
    limits what is received and, separately, what it is decompressed to. The answer also fails if ``stall_seconds`` of
    waiting bring less than 64 KiB. ``seconds_name``, ``stall_name`` and ``bytes_name`` are the names of the settings in
    messages.
    """

    seconds: float = 600
    bytes: int = DEFAULT_BYTES
    stall_seconds: float = float("inf")
    seconds_name: str = "the time limit of an answer"
    stall_name: str = "the time limit of an answer"
    bytes_name: str = "the size limit of an answer"

    def too_slow(self) -> AnswerTooSlow:
        """Return the failure for an answer that was not complete in time."""
        return AnswerTooSlow(f"the answer was incomplete after {self.seconds:g} s (see {self.seconds_name})")

    def stalled(self) -> AnswerTooSlow:
        """Return the failure for an answer that almost stands still."""
        return AnswerTooSlow(
            f"less than {_STALL_BYTES // 1024} KiB came within {self.stall_seconds:g} s (see {self.stall_name})"
        )

    def too_large(self) -> AnswerTooLarge:
        """Return the failure for an answer with too many bytes."""
        return AnswerTooLarge(f"the answer is larger than {self.bytes} bytes", advice=f"see {self.bytes_name}")


class Budget:
    """What is left of the limits of one answer.

    Only the time that is spent on waiting for the server counts.
    """

    def __init__(self, limits: AnswerLimits) -> None:
        self._limits = limits
        self._seconds = limits.seconds
        self._bytes = limits.bytes
        self._stall_seconds = limits.stall_seconds
        self._stall_bytes = 0
        self._started = 0.0

    def start_wait(self) -> float:
        """Begin to wait for the server, and return the seconds that are left. Raises AnswerTooSlow."""
        if self._seconds <= 0:
            raise self._limits.too_slow()
        if self._stall_seconds <= 0:
            raise self._limits.stalled()
        self._started = time.monotonic()
        return min(self._seconds, self._stall_seconds)

    def end_wait(self) -> None:
        """End a wait."""
        seconds = time.monotonic() - self._started
        self._seconds -= seconds
        self._stall_seconds -= seconds

    def receive(self, count: int) -> None:
        """Subtract received bytes. Raises AnswerTooLarge."""
        self._bytes -= count
        if self._bytes < 0:
            raise self._limits.too_large()
        self._stall_bytes += count
        if self._stall_bytes >= _STALL_BYTES:
            self._stall_bytes, self._stall_seconds = 0, self._limits.stall_seconds
