"""The main loop of the post loader: it waits for notifications of posts, and loads the posts of half a second at once.

What a load does is in ``loads``; the reports to Dagster are in ``reports``.
"""

import logging
from threading import Event
from time import monotonic

import psycopg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.orchestration.posts.loads import PostLoads
from fhir_assets.orchestration.posts.reports import PostReports
from fhir_assets.retries import RetryPolicy
from fhir_assets.steps.records import describe_error
from fhir_assets.warehouse.ops import post_loader
from fhir_assets.warehouse.postgres.db import connections
from fhir_assets.warehouse.postgres.db.connections import Connection

GATHER_SECONDS = 0.5
"""The minimum number of seconds between the starts of two loads."""

POLL_SECONDS = 5.0
"""The loader looks for posts at least this often, in seconds, because it may have missed a notification."""

_FIRST_GATHER_SECONDS = 0.05
_LISTEN_SECONDS = 0.25
_STANDBY_SECONDS = 1.0
_ERROR_SECONDS = 1.0
_RECONNECT = RetryPolicy(attempts=1, max_wait=5)

_log = logging.getLogger(__name__)


class PostLoader:
    """Loads posts until it is stopped. Only one loader of a source works at a time; any others stand by."""

    def __init__(self, warehouse: Warehouse, loads: PostLoads, reports: PostReports) -> None:
        self._warehouse = warehouse
        self._loads = loads
        self._reports = reports
        self._stopping = Event()
        self._prepared = False

    def stop(self) -> None:
        """Make ``run`` return after the load in progress."""
        self._stopping.set()

    def run(self) -> None:
        """Load posts until ``stop``. While Postgres cannot be reached, wait for it. Raises ConfigurationError."""
        failures = 0
        try:
            while True:
                try:
                    self._prepare()
                    with connections.connect(
                        self._warehouse.url(), autocommit=True, source=self._warehouse.source
                    ) as conn:
                        failures = 0
                        if self._wait_for_lock(conn):
                            self._serve(conn)
                except (psycopg.OperationalError, DatabaseUnavailable) as error:
                    failures += 1
                    wait = _RECONNECT.wait_seconds(failures)
                    lost = "the connection to the database was lost: reconnecting"
                    _log.warning(
                        lost if self._prepared else "waiting for the database",
                        extra={"seconds": round(wait, 1), "reason": describe_error(error)},
                    )
                    self._stopping.wait(wait)
                if self._stopping.is_set():
                    break
        finally:
            self._reports.stop()

    def _prepare(self) -> None:
        """Create the tables and start the reports, once. Raises DatabaseUnavailable and psycopg.OperationalError."""
        if not self._prepared:
            self._loads.create_tables()
            self._reports.start()
            self._prepared = True

    def _wait_for_lock(self, conn: Connection) -> bool:
        """Wait until no other loader of the source runs. Return False if this one was stopped in the meantime."""
        logged = False
        while not self._stopping.is_set():
            if post_loader.try_begin(conn):
                post_loader.listen(conn)
                _log.info("post loader started")
                return True
            if not logged:
                logged = True
                _log.info("another post loader runs: this one stands by")
            self._stopping.wait(_STANDBY_SECONDS)
        return False

    def _serve(self, conn: Connection) -> None:
        while not self._stopping.is_set():
            started = monotonic()
            if self._load_waiting():
                self._stopping.wait(max(0.0, started + GATHER_SECONDS - monotonic()))
            elif self._wait_for_post(conn):
                self._stopping.wait(_FIRST_GATHER_SECONDS)
        _log.info("post loader stopped")

    def _load_waiting(self) -> bool:
        """Receive and load the waiting posts. Return whether any were loaded."""
        try:
            self._loads.receive_files()
            found = False
            for load in self._loads.run():
                if load is not None:
                    found = True
                    self._reports.add(load)
            return found
        except Exception as error:
            # The posts are stored in the landing zone or in raw. The sensors load those that wait too long.
            _log.warning("posts could not be loaded: trying again", extra={"reason": describe_error(error)})
            self._stopping.wait(_ERROR_SECONDS)
            return False

    def _wait_for_post(self, conn: Connection) -> bool:
        """Wait for a notification. Return False if a postponed window is due, after POLL_SECONDS, or after ``stop``."""
        until = monotonic() + min(POLL_SECONDS, self._loads.seconds_to_next_attempt)
        while not self._stopping.is_set() and monotonic() < until:
            for _ in conn.notifies(timeout=_LISTEN_SECONDS, stop_after=1):
                return True
        return False
