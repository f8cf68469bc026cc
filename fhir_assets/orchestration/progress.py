"""Progress of a source, reported to the run that waits for it.

The source is built once for a process, before any run exists. It reports its progress to a ``ProgressRelay``, which
passes the text on to the run in whose context the source works.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Report = Callable[[str], None]


class ProgressRelay:
    """A progress callback whose receiver is set for a ``with`` block. Without a receiver a text is dropped.

    The receiver belongs to the context of the thread that sets it: runs in other threads do not see its texts.
    """

    def __init__(self) -> None:
        self._receiver: ContextVar[Report | None] = ContextVar("progress receiver", default=None)

    def __call__(self, text: str) -> None:
        """Pass a text on to the receiver."""
        receiver = self._receiver.get()
        if receiver is not None:
            receiver(text)

    @contextmanager
    def send_to(self, receiver: Report) -> Iterator[None]:
        """Send every text that is reported in the ``with`` block to ``receiver``."""
        token = self._receiver.set(receiver)
        try:
            yield
        finally:
            self._receiver.reset(token)
