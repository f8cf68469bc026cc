"""The database of a deployment: DB_URL's, or the embedded one, migrated before its first use."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from fhir_assets.privacy.encryption import Cipher
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import encryption_secret, runs
from fhir_assets.warehouse.postgres.db import advisory_locks, connections, embedded, migrations
from fhir_assets.warehouse.postgres.db.semaphore import DistributedSemaphore

DATABASE = "fhir_assets"


class Warehouse:
    """Opens connections. Making one touches nothing; the first connection starts and migrates what is needed.

    ``source_calls`` limits calls of the FHIR server and ``table_loads`` limits loads into the tables, both over all
    processes that share the database.
    """

    def __init__(self, settings: Settings) -> None:
        self._db_url = settings.db_url.get_secret_value() if settings.db_url else None
        self._home: Path = settings.home
        self._cipher = settings.cipher
        self._url: str | None = None
        self._lock = Lock()
        self.source_calls = DistributedSemaphore(
            self._connect_for_slots, advisory_locks.SOURCE_CALLS, settings.fhir_max_connections
        )
        self.table_loads = DistributedSemaphore(
            self._connect_for_slots, advisory_locks.TABLE_LOADS, settings.fhir_max_loaders
        )

    def url(self) -> str:
        """The URL of the running, migrated database. Raises DatabaseUnavailable; ConfigurationError if it is sealed
        with a key that is missing.
        """
        with self._lock:
            if self._url is None:
                url = self._db_url or embedded.ensure(self._home)
                migrations.upgrade(url)
                with connections.connect(url) as conn:
                    self._cipher = encryption_secret.unlock(conn, self._cipher)
                self._url = url
            return self._url

    def cipher(self) -> Cipher:
        """What seals the patient data in this database. Raises as ``url`` does."""
        self.url()
        return self._cipher

    def connect(self) -> connections.Session:
        """A connection for the caller alone, not in autocommit, that carries the keys. Raises as ``url`` does."""
        return connections.borrow(self.url(), cipher=self.cipher())

    def look(self) -> connections.Connection:
        """A connection that needs no keys and can only read: for who looks after runs and dead letters.

        Raises DatabaseUnavailable or ConfigurationError.
        """
        url = self._db_url or embedded.ensure(self._home)
        migrations.upgrade(url)
        conn = connections.connect(url)
        conn.read_only = True
        return conn

    def _connect_for_slots(self) -> connections.Connection:
        return connections.connect(self.url(), autocommit=True)

    @contextmanager
    def held_for(self, run_id: str) -> Iterator["Warehouse"]:
        """The warehouse, for a run that counts as living meanwhile. Raises DatabaseUnavailable."""
        with connections.connect(self.url(), autocommit=True) as conn:
            runs.hold(conn, run_id)
            yield self
