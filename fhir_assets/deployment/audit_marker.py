"""Writes the mark of the audit log in the store after commits.

``AuditMarker`` writes it in a thread: at once after the first record of a process, then at most every
``MARK_SECONDS``, and when a command, a run or the process ends. Records that are younger than the mark are not vouched
for: those of the last ``MARK_SECONDS``, and those of a process that was killed, until any process writes the next mark.
"""

import atexit
import logging
from collections.abc import Callable
from threading import Event, Lock, Thread
from time import monotonic
from typing import Protocol

import psycopg

from fhir_assets.errors import FhirAssetsError
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session

MARK_SECONDS = 5.0
"""The minimum number of seconds between two marks of a process."""

_GATHER_SECONDS = 0.1
_FINISH_SECONDS = 10.0
_ATTEMPTS = 12

_log = logging.getLogger(__name__)


class Marks(Protocol):
    """What writes a mark: ``audit_marks.AuditMarks``, whose imports only a process that records something needs."""

    def advance(self, conn: Session) -> int:
        """Write the mark of the last committed record, and return its number."""
        ...


class AuditMarker:
    """Writes the mark after audit records, in a thread that ends when the mark has caught up. Safe for threads.

    ``open_marks`` and ``connect`` are called in the thread.
    """

    def __init__(self, open_marks: Callable[[], Marks], connect: OpenSession) -> None:
        self._open_marks = open_marks
        self._connect = connect
        self._marks: Marks | None = None
        self._lock = Lock()
        self._hurry = Event()
        self._thread: Thread | None = None
        self._wanted = 0
        self._written_at = -MARK_SECONDS

    def note(self, seq: int) -> None:
        """Let the mark follow to the record ``seq``, which is going to be committed."""
        with self._lock:
            self._wanted = max(self._wanted, seq)
            if self._thread is None or not self._thread.is_alive():
                self._hurry.clear()
                self._thread = Thread(target=self._work, name="audit mark", daemon=True)
                _WORKING.add(self)
                self._thread.start()

    def finish(self, *, only_if_due: bool = False) -> None:
        """Write the mark of all committed records now. With ``only_if_due`` not within ``MARK_SECONDS`` of the last."""
        with self._lock:
            thread = self._thread
        if thread is None or not thread.is_alive() or (only_if_due and self._wait_seconds() > 0):
            return
        self._hurry.set()
        thread.join(_FINISH_SECONDS)

    def _wait_seconds(self) -> float:
        return max(0.0, self._written_at + MARK_SECONDS - monotonic())

    def _work(self) -> None:
        for attempts_left in reversed(range(_ATTEMPTS)):
            hurried = self._hurry.wait(max(_GATHER_SECONDS, self._wait_seconds()))
            reached = self._advance()
            with self._lock:
                # What is still missing at the end was rolled back, or the store cannot be written.
                if reached >= self._wanted or hurried or not attempts_left:
                    self._wanted = 0
                    self._thread = None
                    _WORKING.discard(self)
                    return

    def _advance(self) -> int:
        try:
            if self._marks is None:
                self._marks = self._open_marks()
            with self._connect() as conn:
                return self._marks.advance(conn)
        except (FhirAssetsError, psycopg.Error, OSError) as error:
            _log.info("the mark of the audit log was not written", extra={"reason": type(error).__name__})
            return 0
        finally:
            self._written_at = monotonic()


_WORKING: set[AuditMarker] = set()
"""The markers whose thread runs."""


def finish_marks() -> None:
    """Write the marks of all records that this process has committed."""
    for marker in list(_WORKING):
        marker.finish()


atexit.register(finish_marks)
