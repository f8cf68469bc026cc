"""The mark of the audit log in the store: written after commits, and compared with the log.

``AuditMarker`` writes it in a thread: at once after the first record of a process, then at most every
``MARK_SECONDS``, and when a command, a run or the process ends. Records that are younger than the mark are not vouched
for: those of the last ``MARK_SECONDS``, and those of a process that was killed, until any process writes the next mark.
"""

import atexit
import logging
from collections.abc import Callable
from dataclasses import asdict
from threading import Event, Lock, Thread
from time import monotonic

import psycopg

from fhir_assets.errors import ConfigurationError, FhirAssetsError
from fhir_assets.privacy.audit import Fault
from fhir_assets.privacy.audit_mark import MARK, AcceptedLoss, Mark, build_mark, decode_mark, encode_mark
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.storage.marker import read_marker
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import audit_log, sources
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session, cipher_of

MARK_SECONDS = 5.0
"""The minimum number of seconds between two marks of a process."""

_GATHER_SECONDS = 0.1
_FINISH_SECONDS = 10.0
_ATTEMPTS = 12

_log = logging.getLogger(__name__)


class AuditMarks:
    """Reads and writes the mark in the store of a database.

    A store that is not bound to the database (``store.json``) has no mark: a command on another machine, which only
    has the database, does not write one into its own empty store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._bound_to = ""

    def read(self, conn: Session) -> Mark | None:
        """Return the mark, or None if there is none or the store belongs to another database. Raises StoreError."""
        content = self._store.blobs.get(MARK) if self._is_bound(conn) else None
        return decode_mark(content) if content is not None else None

    def advance(self, conn: Session) -> int:
        """Write the mark of the last committed record, and return its number; 0 if the store is of no use.

        The mark never moves backwards, and not to a log that contradicts it: `fhir-assets audit verify` tells why.

        Raises StoreError, and psycopg.errors.LockNotAvailable if another process writes the mark for seconds.
        """
        audit_log.lock_mark(conn)
        seq, link = audit_log.get_head(conn)
        if not self._is_bound(conn):
            return seq
        mark = self.read(conn)
        if fault := find_mark_fault(conn, mark):
            _log.warning(
                "the mark of the audit log is not advanced: run `fhir-assets audit verify`", extra=asdict(fault)
            )
            return seq
        if mark is None or mark.seq < seq or not mark.is_valid(cipher_of(conn)):
            self._write(conn, build_mark(seq, link, cipher_of(conn), mark.losses if mark else ()))
        return seq

    def accept(self, conn: Session) -> Mark | None:
        """Replace a mark that the log contradicts by that of the last record. Return the replaced one, None without.

        The replaced mark is kept in the new one. Raises StoreError, ConfigurationError if the store belongs to another
        database.
        """
        audit_log.lock_mark(conn)
        if not self._is_bound(conn):
            raise ConfigurationError(f"{self._store.blobs.url} is not the store of this database: set FHIR_STORE_URL")
        mark = self.read(conn)
        losses = mark.losses if mark else ()
        seq, link = audit_log.get_head(conn)
        new = build_mark(seq, link, cipher_of(conn))
        if mark:
            losses = (*losses, AcceptedLoss(mark.seq, mark.link, mark.at, new.at))
        self._write(conn, build_mark(seq, link, cipher_of(conn), losses))
        return mark

    def _write(self, conn: Session, mark: Mark) -> None:
        self._store.blobs.put(MARK, encode_mark(mark))
        if not audit_log.is_marked(conn):
            audit_log.confirm_mark(conn)

    def _is_bound(self, conn: Session) -> bool:
        if not self._bound_to:
            marker, link = read_marker(self._store), sources.read_link(conn)
            if marker and link and marker.database == link.database_id:
                self._bound_to = marker.database
        return bool(self._bound_to)


def find_mark_fault(conn: Session, mark: Mark | None) -> Fault | None:
    """Return what the mark in the store shows: a log that lost its end or was rewritten, or a mark that was changed.

    With encryption keys, an unsigned mark is one from before the first key if the record that it names is, too.
    """
    seq, _ = audit_log.get_head(conn)
    if mark is None:
        return Fault(seq, "unmarked") if audit_log.is_marked(conn) else None
    if not mark.is_valid(cipher_of(conn)) and (not mark.is_valid(NO_ENCRYPTION) or audit_log.is_keyed(conn, mark.seq)):
        return Fault(mark.seq, "mark altered")
    if mark.seq > seq:
        return Fault(seq + 1, "missing")
    return audit_log.check_link(conn, mark.seq, mark.link) if mark.seq else None


class AuditMarker:
    """Writes the mark after audit records, in a thread that ends when the mark has caught up. Safe for threads.

    ``open_marks`` and ``connect`` are called in the thread.
    """

    def __init__(self, open_marks: Callable[[], AuditMarks], connect: OpenSession) -> None:
        self._open_marks = open_marks
        self._connect = connect
        self._marks: AuditMarks | None = None
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
