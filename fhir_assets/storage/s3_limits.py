"""The limits of what a server of S3 may send, and how long it may take.

The timeout of a connection limits the wait for the next byte only: a server that sends a byte now and then would occupy
a run forever.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fhir_assets.errors import StoreError, StoreUnavailable

SMALL_OBJECT_BYTES = 64 << 20
"""The size of an object that is read as a whole, such as a manifest."""


@dataclass(frozen=True, slots=True)
class S3Limits:
    """The limits of the calls to a server of S3.

    ``seconds`` is the time of one request, and that in which it may be repeated. An object that is read, and a
    listing, may take ``object_seconds`` of waiting. The object has at most ``object_bytes`` and brings 64 KiB in
    ``seconds``; the listing has at most ``max_objects``.
    """

    seconds: float = 600
    object_seconds: float = 6 * 3600
    object_bytes: int = 64 << 30
    max_objects: int = 10_000_000


class Waits:
    """The time that is spent on waiting for the server while one object is read, or one listing."""

    def __init__(self, limits: S3Limits, action: str) -> None:
        self._limits = limits
        self._action = action
        self._seconds = 0.0
        self._bytes = 0

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Wait for the server in a ``with`` block. Raises StoreUnavailable if the time is over."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds += time.monotonic() - started
        if self._seconds > self._limits.object_seconds:
            raise StoreUnavailable(
                f"cannot {self._action}: it was incomplete after {self._limits.object_seconds:g} s (see "
                "FHIR_S3_OBJECT_SECONDS). Run it again later"
            )

    def receive(self, count: int) -> None:
        """Count received bytes. Raises StoreError if they are too many."""
        self._bytes += count
        if self._bytes > self._limits.object_bytes:
            raise StoreError(
                f"cannot {self._action}: it is larger than {self._limits.object_bytes} bytes (see FHIR_S3_OBJECT_BYTES)"
            )
