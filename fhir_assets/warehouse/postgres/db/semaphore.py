"""How many may do a thing at once, over all processes on all machines that share the database.

A place is an advisory lock of Postgres: it is free again in the moment in which its process dies, however it dies.
Dagster's pools hold steps, not calls; a run that waits for one sleeps up to 15 seconds; and a dead run keeps its place
until somebody notices. They are there for an operator to slow a deployment down, not to keep a promise.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from threading import Lock
from typing import Any

import psycopg

from fhir_assets.warehouse.postgres.db.connections import Connection

_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.1


class Kind(IntEnum):
    """What places are for; the value is the first key of their locks."""

    CALLS = 0x66686331
    """Calls of the FHIR server ("fhc1")."""
    LOADERS = 0x66686C31
    """Loads into the tables ("fhl1")."""


class DistributedSemaphore:
    """``limit`` places of a kind. One object serves all threads of a process, over a connection of its own.

    Every process of a deployment has to have the same limit.
    """

    def __init__(self, connect: Callable[[], Connection], kind: Kind, limit: int) -> None:
        self._connect = connect
        self._kind = kind
        self._limit = limit
        self._conn: Connection | None = None
        self._held: set[int] = set()
        self._mutex = Lock()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold a place, once there is one. Raises DatabaseUnavailable."""
        pause = _FIRST_PAUSE
        while (place := self._take()) is None:
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(1.5 * pause, _LONGEST_PAUSE)
        try:
            yield
        finally:
            self._leave(place)

    def close(self) -> None:
        """Let the connection go, and with it what is held."""
        with self._mutex:
            if self._conn is not None:
                self._conn.close()
            self._conn = None

    def _take(self) -> int | None:
        with self._mutex:
            # A session gets a lock that it holds already once more: its own places are not asked for.
            free = [place for place in range(self._limit) if place not in self._held]
            if not free:
                return None
            random.shuffle(free)
            row = self._ask(
                "SELECT place FROM unnest(%s::int[]) place WHERE pg_try_advisory_lock(%s, place) LIMIT 1",
                [free, int(self._kind)],
            )
            if row is None:
                return None
            self._held.add(row[0])
            return int(row[0])

    def _leave(self, place: int) -> None:
        with self._mutex:
            self._held.discard(place)
            # Without its connection the place is free already.
            with suppress(psycopg.Error):
                if self._conn is not None:
                    self._conn.execute("SELECT pg_advisory_unlock(%s, %s)", [int(self._kind), place])

    def _ask(self, query: str, params: list[Any]) -> tuple[Any, ...] | None:
        if self._conn is not None:
            try:
                return self._conn.execute(query, params).fetchone()
            except psycopg.OperationalError:
                self._conn.close()
        self._conn = self._connect()
        return self._conn.execute(query, params).fetchone()
