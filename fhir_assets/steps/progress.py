"""Progress messages of a source, passed on to the run that reads from it.

A process builds its source once, before its first run. The source reports its progress to a ``ProgressRelay``, which
passes each message on to the run that reads from the source at that time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fhir_assets.control_characters import escape_control_characters

Report = Callable[[str], None]


class ProgressRelay:
    """A progress callback whose receiver is set for a ``with`` block. Without a receiver, messages are dropped.

    The receiver is a context variable: it does not receive messages of runs in other threads.
    """

    def __init__(self) -> None:
        self._receiver: ContextVar[Report | None] = ContextVar("progress receiver", default=None)

    def __call__(self, text: str) -> None:
        """Pass a message on to the receiver, without control characters: a server may have sent a part of it."""
        receiver = self._receiver.get()
        if receiver is not None:
            receiver(escape_control_characters(text))

    @contextmanager
    def send_to(self, receiver: Report) -> Iterator[None]:
        """Send every message that is reported in the ``with`` block to ``receiver``."""
        token = self._receiver.set(receiver)
        try:
            yield
        finally:
            self._receiver.reset(token)
