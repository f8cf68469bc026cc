"""The database of a deployment: at DB_URL, or embedded."""

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Lock

from fhir_assets.deployment.audit_marker import AuditMarker, Marks
from fhir_assets.deployment.encryption import build_cipher
from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.retries import RetryPolicy
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import encryption_secret, liveness
from fhir_assets.warehouse.postgres.db import (
    advisory_locks,
    connections,
    embedded,
    migration_checksums,
    roles,
    schema_state,
)
from fhir_assets.warehouse.postgres.db.database_clock import DatabaseClock
from fhir_assets.warehouse.postgres.db.semaphore import DistributedSemaphore


class Warehouse:
    """Opens connections to the database of a deployment. Creating the object opens none.

    Only ``migrate`` (`fhir-assets migrate`) migrates a database at DB_URL. The embedded database is started when it is
    first opened, and migrated when it is first opened for writing.

    ``source_calls`` limits calls of the FHIR server and ``table_loads`` limits loads into the tables, both over all
    processes that share the database.
    """

    def __init__(self, settings: Settings) -> None:
        self._db_url = settings.db_url.get_secret_value() if settings.db_url else None
        self._home: Path = settings.home
        self._port = settings.fhir_postgres_port
        self.source = settings.source
        """The key of the source that all sessions belong to."""
        self._cipher = build_cipher(settings)
        self._url: str | None = None
        self._lock = Lock()
        self.audit_marker = AuditMarker(lambda: _open_marks(settings), self.connect)
        """Writes the mark of the audit log after the audit records of this warehouse's sessions."""
        self.now = DatabaseClock(self.connect)
        """Returns the time of the database's server, by which arrivals are dated. Raises as ``url`` does."""
        self.source_calls = DistributedSemaphore(
            self._connect_for_slots, advisory_locks.SOURCE_CALLS, settings.fhir_max_connections
        )
        self.table_loads = DistributedSemaphore(
            self._connect_for_slots, advisory_locks.TABLE_LOADS, settings.fhir_max_loaders
        )

    def url(self) -> str:
        """Return the URL of the running database.

        Raises DatabaseUnavailable, and ConfigurationError if its schema is not at the revision of this version, or if
        it is encrypted with a key that is missing.
        """
        with self._lock:
            if self._url is None:
                if self._db_url:
                    url = self._db_url
                    schema_state.require_current(url)
                else:
                    url = embedded.ensure(self._home, port=self._port)
                    _upgrade(url)
                with connections.connect(url) as conn:
                    self._cipher = encryption_secret.unlock(conn, self._cipher)
                self._url = url
            return self._url

    def cipher(self) -> Cipher:
        """Return the cipher of the patient data in this database. Raises as ``url`` does."""
        self.url()
        return self._cipher

    def connect(self) -> AbstractContextManager[connections.Session]:
        """Return a session for a ``with`` block; see ``connections.borrow_session``. Raises as ``url`` does."""
        return connections.borrow_session(
            self.url(), cipher=self.cipher(), source=self.source, on_audit=self.audit_marker.note
        )

    def wait(self, policy: RetryPolicy, log: logging.Logger) -> None:
        """Wait until the database can be reached, and log a warning before each further attempt.

        Raises DatabaseUnavailable after ``policy.budget`` seconds, and ConfigurationError as ``url`` does.
        """
        until = time.monotonic() + policy.budget
        failures = 0
        while True:
            try:
                with self.connect():
                    return
            except DatabaseUnavailable as error:
                failures += 1
                wait = policy.wait_seconds(failures)
                if time.monotonic() + wait > until:
                    raise
                log.warning("waiting for the database", extra={"seconds": round(wait, 1), "reason": str(error)})
                time.sleep(wait)

    def connect_read_only(self) -> connections.Connection:
        """Open a read-only connection without a cipher, for listing runs and dead letters. It changes no schema.

        Raises DatabaseUnavailable, and ConfigurationError if the schema is not at the revision of this version.
        """
        url = self._db_url or embedded.ensure(self._home, port=self._port)
        schema_state.require_current(url)
        conn = connections.connect(url, source=self.source)
        conn.read_only = True
        return conn

    def connect_to_locks(self) -> connections.Connection:
        """Open a connection for questions about locks only, for which a login needs no right on any table.

        The schema is not checked. Raises DatabaseUnavailable and ConfigurationError.
        """
        return connections.connect(self._db_url or embedded.ensure(self._home, port=self._port), source=self.source)

    def connect_as_reader(self) -> connections.Connection:
        """Open a connection as ``connect_read_only`` does, with the rights of ``fhir_reader`` only.

        A login that may not take that role keeps its own rights.
        """
        conn = self.connect_read_only()
        roles.take_reader_role(conn)
        return conn

    def migrate(self) -> None:
        """Create or upgrade the schema. Raises as ``migrations.upgrade`` does, also if the schema is current."""
        url = self._db_url or embedded.ensure(self._home, port=self._port)
        _upgrade(url)
        with connections.connect(url) as conn:
            migration_checksums.require_unchanged(conn)

    @contextmanager
    def hold_run(self, run_id: str) -> Iterator["Warehouse"]:
        """Mark a run as alive for the ``with`` block. Raises DatabaseUnavailable."""
        with connections.connect(self.url(), autocommit=True) as conn:
            liveness.hold_liveness_lock(conn, run_id)
            try:
                yield self
            finally:
                self.audit_marker.finish(only_if_due=True)

    @contextmanager
    def take_run(self, run_id: str) -> Iterator[bool]:
        """Yield whether this process may execute a run; no other process may during the ``with`` block.

        Raises DatabaseUnavailable.
        """
        with connections.connect(self.url(), autocommit=True) as conn:
            yield liveness.take_execution(conn, run_id)

    def _connect_for_slots(self) -> connections.Connection:
        return connections.connect(self.url(), autocommit=True)


def _open_marks(settings: Settings) -> Marks:
    """Return what writes the mark of the audit log. Commands that record nothing do not import it, nor the store."""
    from fhir_assets.deployment.audit_marks import open_marks

    return open_marks(settings)


def _upgrade(url: str) -> None:
    """Upgrade the schema if it is not current. Only then are Alembic and SQLAlchemy imported."""
    if not schema_state.is_current(url):
        from fhir_assets.warehouse.postgres.db import migrations

        migrations.upgrade(url)
