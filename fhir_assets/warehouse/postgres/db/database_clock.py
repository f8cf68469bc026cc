"""The time of the database's server, by which arrivals are dated on every machine of a deployment.

Of two versions without ``meta.lastUpdated`` the one that arrived last is newer. By the clocks of the machines that
receive them, a machine whose clock is fast, or was, would win over all others until they reach its time.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from threading import Lock
from time import monotonic
from typing import cast

from fhir_assets.warehouse.postgres.db.connections import OpenSession

_VALID_SECONDS = 60.0


class DatabaseClock:
    """Returns the time of the server (UTC) when it is called; it never goes back. Safe for use by several threads.

    The server is asked once a minute; in between, the monotonic clock of this machine counts.
    """

    def __init__(self, connect: OpenSession, *, elapsed: Callable[[], float] = monotonic) -> None:
        self._connect = connect
        self._elapsed = elapsed
        self._lock = Lock()
        self._asked: tuple[datetime, float] | None = None
        self._last: datetime | None = None

    def __call__(self) -> datetime:
        """Return the time. Raises DatabaseUnavailable, and ConfigurationError as sessions of the database do."""
        with self._lock:
            if self._asked is None or self._elapsed() - self._asked[1] > _VALID_SECONDS:
                self._asked = self._ask(), self._elapsed()
            moment, at = self._asked
            now = moment + timedelta(seconds=self._elapsed() - at)
            self._last = max(now, self._last or now)
            return self._last

    def _ask(self) -> datetime:
        with self._connect() as conn:
            (now,) = conn.execute("SELECT clock_timestamp() AT TIME ZONE 'UTC'").fetchone() or ()
        return cast(datetime, now).replace(tzinfo=UTC)
