"""The database of a deployment: DB_URL's, or the embedded one, migrated before its first use."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import psycopg

from fhir_assets.settings import Settings
from fhir_assets.warehouse import database, embedded, migrate, runs

DATABASE = "fhir_assets"


class Warehouse:
    """Opens connections. Making one touches nothing; the first connection starts and migrates what is needed."""

    def __init__(self, settings: Settings) -> None:
        self._db_url = settings.db_url.get_secret_value() if settings.db_url else None
        self._home: Path = settings.home
        self._url: str | None = None
        self._lock = Lock()

    def url(self) -> str:
        """The URL of the running, migrated database. Raises DatabaseUnavailable."""
        with self._lock:
            if self._url is None:
                url = self._db_url or embedded.ensure(self._home)
                migrate.upgrade(url)
                self._url = url
            return self._url

    def connect(self) -> psycopg.Connection:
        """A new connection, not in autocommit. Raises DatabaseUnavailable."""
        return database.connect(self.url())

    @contextmanager
    def held_for(self, run_id: str) -> Iterator["Warehouse"]:
        """The warehouse, for a run that counts as living meanwhile. Raises DatabaseUnavailable."""
        with database.connect(self.url(), autocommit=True) as conn:
            runs.hold(conn, run_id)
            yield self
