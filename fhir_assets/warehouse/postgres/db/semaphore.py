"""A semaphore over all processes on all machines that share the database.

A slot of the semaphore is an advisory lock of Postgres. Postgres frees it as soon as its process ends, even if it is
killed. Dagster's concurrency pools are no substitute: they limit steps, not calls; a run that waits for a slot sleeps
up to 15 seconds; and a run that was killed keeps its slot until an operator frees it.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any

import psycopg

from fhir_assets.warehouse.postgres.db.connections import Connection

_FIRST_PAUSE_SECONDS = 0.005
_LONGEST_PAUSE_SECONDS = 0.1


class DistributedSemaphore:
    """A semaphore of ``limit`` slots, which are advisory locks with ``lock_key`` as first key.

    One object serves all threads of a process and holds its slots over one connection of its own, which ``connect``
    opens in autocommit mode. Every process of a deployment must be configured with the same limit.
    """

    def __init__(self, connect: Callable[[], Connection], lock_key: int, limit: int) -> None:
        self._connect = connect
        self._lock_key = lock_key
        self._limit = limit
        self._conn: Connection | None = None
        self._held: set[int] = set()
        self._mutex = Lock()

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Wait for a free slot and hold it for the ``with`` block. Raises DatabaseUnavailable."""
        pause = _FIRST_PAUSE_SECONDS
        while (number := self.try_acquire()) is None:
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)
        try:
            yield
        finally:
            self.release(number)

    def try_acquire(self) -> int | None:
        """Take a free slot and return its number, or None if all slots are taken. Raises DatabaseUnavailable."""
        with self._mutex:
            # Postgres grants a lock again to the session that holds it, so slots of this process are left out.
            free = [number for number in range(self._limit) if number not in self._held]
            if not free:
                return None
            random.shuffle(free)
            row = self._fetch_one(
                """
                SELECT slot
                FROM unnest(%s::int[]) slot
                WHERE pg_try_advisory_lock(%s, slot)
                LIMIT 1
                """,
                [free, self._lock_key],
            )
            if row is None:
                return None
            self._held.add(row[0])
            return int(row[0])

    def release(self, number: int) -> None:
        """Free the slot ``number``. A lost connection has freed it already."""
        with self._mutex:
            self._held.discard(number)
            with suppress(psycopg.Error):
                if self._conn is not None:
                    self._conn.execute("SELECT pg_advisory_unlock(%s, %s)", [self._lock_key, number])

    def close(self) -> None:
        """Close the connection, which frees every slot that this object holds."""
        with self._mutex:
            if self._conn is not None:
                self._conn.close()
            self._conn = None

    def _fetch_one(self, query: str, params: list[Any]) -> tuple[Any, ...] | None:
        if self._conn is not None:
            try:
                return self._conn.execute(query, params).fetchone()
            except psycopg.OperationalError:
                self._conn.close()
        self._conn = self._connect()
        return self._conn.execute(query, params).fetchone()
