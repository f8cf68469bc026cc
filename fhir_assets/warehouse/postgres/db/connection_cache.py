"""Connections that wait to be used again.

A load asks for a connection at nearly every statement, from several threads and one inside the other. A new one starts
a process of Postgres that has to read its catalogs first: that costs several times the statement. A pool of a fixed
size would let nested askers wait for each other; this one only keeps what was given back, needs no thread, and a new
connection is made, or says why not, where it is asked for.
"""

import atexit
import os
import selectors
from collections import deque
from threading import Lock
from time import monotonic
from typing import Any, NamedTuple

import psycopg
from psycopg.pq import PipelineStatus, TransactionStatus

ROOM = 8
"""Connections that wait at most, in the whole process."""

SECONDS = 60.0
"""A connection that nobody asked for in so long is closed when the next one comes or goes."""

_Connection = psycopg.Connection[Any]


class _Waiting(NamedTuple):
    key: str
    since: float
    connection: _Connection


class ConnectionCache:
    """Idle connections by where they lead. Safe for threads; a forked child begins without any."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: deque[_Waiting] = deque()

    def take(self, key: str) -> _Connection | None:
        """A connection that is as a new one, and there; None if none waits."""
        while True:
            with self._lock:
                old = self._outdated()
                found = next((each for each in reversed(self._waiting) if each.key == key), None)
                if found:
                    self._waiting.remove(found)
            _close(old)
            if found is None:
                return None
            if _is_there(found.connection):
                return found.connection
            _close([found])

    def keep(self, key: str, connection: _Connection) -> bool:
        """Keep a connection that is done with, as if it were new: what was not committed is rolled back, and locks,
        settings and temporary tables are gone. False if it is of no more use.
        """
        if not _as_new(connection):
            return False
        with self._lock:
            self._waiting.append(_Waiting(key, monotonic(), connection))
            old = self._outdated()
        _close(old)
        return True

    def clear(self) -> None:
        """Close all that wait."""
        with self._lock:
            old = list(self._waiting)
            self._waiting.clear()
        _close(old)

    def forget(self) -> None:
        """After a fork they are the parent's: leave them to it."""
        self._lock = Lock()
        self._waiting = deque()

    def _outdated(self) -> list[_Waiting]:
        """Taken out: those beyond the room, and those that waited too long, which are first in the row."""
        since = monotonic() - SECONDS
        old = []
        while self._waiting and (len(self._waiting) > ROOM or self._waiting[0].since < since):
            old.append(self._waiting.popleft())
        return old


def _as_new(connection: _Connection) -> bool:
    if connection.closed or connection.pgconn.pipeline_status != PipelineStatus.OFF:
        return False
    status = connection.pgconn.transaction_status
    if status not in (TransactionStatus.IDLE, TransactionStatus.INTRANS, TransactionStatus.INERROR):
        return False
    try:
        if status != TransactionStatus.IDLE:
            connection.rollback()
        connection.autocommit = True
        connection.execute("DISCARD ALL", prepare=False)
        connection.autocommit = False
    except psycopg.Error:
        return False
    return True


def _is_there(connection: _Connection) -> bool:
    """Whether the server still holds the other end: of one that ended, its farewell waits to be read."""
    if connection.closed:
        return False
    with selectors.DefaultSelector() as selector:
        selector.register(connection.fileno(), selectors.EVENT_READ)
        return not selector.select(0)


def _close(waiting: list[_Waiting]) -> None:
    for each in waiting:
        each.connection.close()


CONNECTION_CACHE = ConnectionCache()
"""This process's."""

atexit.register(CONNECTION_CACHE.clear)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=CONNECTION_CACHE.forget)
