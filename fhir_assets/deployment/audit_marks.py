"""The mark of the audit log in the store: reads it, writes it, and compares it with the log."""

import logging
from dataclasses import asdict

from fhir_assets.deployment.store import build_root
from fhir_assets.errors import ConfigurationError
from fhir_assets.privacy.audit import MARK, Fault
from fhir_assets.privacy.audit_mark import AcceptedLoss, Mark, build_mark, decode_mark, encode_mark
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.settings import Settings
from fhir_assets.storage.marker import read_marker
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import audit_log, sources
from fhir_assets.warehouse.postgres.db.connections import Session, cipher_of

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


def open_marks(settings: Settings) -> AuditMarks:
    """Return the marks in the store of a deployment. Raises ConfigurationError."""
    return AuditMarks(build_root(settings))
