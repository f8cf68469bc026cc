"""Idle connections of this process, kept for reuse.

A load opens a connection for nearly every statement, in several threads and in nested blocks; a new connection takes
several times as long as the statement. ``psycopg_pool.ConnectionPool`` is equally fast for idle connections, but slower
for the first one (5.9 ms, here 4.3 ms). If the server is down, the pool reports a timeout after ten seconds without the
reason; a connection that is opened here fails immediately with the reason. In a pool of a fixed size, nested requests
of several threads can deadlock.
"""

import atexit
import os
import selectors
from collections import deque
from collections.abc import Iterable
from threading import Lock
from time import monotonic
from typing import Any, NamedTuple

import psycopg
from psycopg.pq import PipelineStatus, TransactionStatus

MAX_IDLE = 8
"""The maximum number of idle connections of the process."""

MAX_IDLE_SECONDS = 60.0
"""A connection that is idle for longer is closed at the next ``take`` or ``put``."""

_Connection = psycopg.Connection[Any]


class _Idle(NamedTuple):
    key: str
    since: float
    connection: _Connection


class ConnectionCache:
    """Idle connections by key. Safe for threads; a forked child process starts with an empty cache."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._idle: deque[_Idle] = deque()

    def take(self, key: str) -> _Connection | None:
        """Remove and return an open connection in its initial state, or None if no connection is idle."""
        while True:
            with self._lock:
                expired = self._remove_expired()
                entry = next((entry for entry in reversed(self._idle) if entry.key == key), None)
                if entry:
                    self._idle.remove(entry)
            _close(expired)
            if entry is None:
                return None
            if _is_connected(entry.connection):
                return entry.connection
            _close([entry])

    def put(self, key: str, connection: _Connection) -> None:
        """Keep a connection for reuse, or close it if it is broken.

        The connection is reset to its initial state: an open transaction is rolled back, and locks, settings and
        temporary tables are dropped.
        """
        if not _reset(connection):
            connection.close()
            return
        with self._lock:
            self._idle.append(_Idle(key, monotonic(), connection))
            expired = self._remove_expired()
        _close(expired)

    def clear(self) -> None:
        """Close all idle connections."""
        with self._lock:
            entries = list(self._idle)
            self._idle.clear()
        _close(entries)

    def abandon(self) -> None:
        """Drop all connections without closing them: after a fork they belong to the parent process."""
        self._lock = Lock()
        self._idle = deque()

    def _remove_expired(self) -> list[_Idle]:
        """Remove and return the connections over ``MAX_IDLE`` and those idle too long; the oldest are first."""
        since = monotonic() - MAX_IDLE_SECONDS
        expired = []
        while self._idle and (len(self._idle) > MAX_IDLE or self._idle[0].since < since):
            expired.append(self._idle.popleft())
        return expired


def _reset(connection: _Connection) -> bool:
    """Reset a connection to its initial state. Return False if that is impossible."""
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


def _is_connected(connection: _Connection) -> bool:
    """Return whether the server has not ended the connection: its last message would be unread input."""
    if connection.closed:
        return False
    with selectors.DefaultSelector() as selector:
        selector.register(connection.fileno(), selectors.EVENT_READ)
        return not selector.select(0)


def _close(entries: Iterable[_Idle]) -> None:
    for entry in entries:
        entry.connection.close()


CONNECTION_CACHE = ConnectionCache()
"""The cache of this process."""

atexit.register(CONNECTION_CACHE.clear)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=CONNECTION_CACHE.abandon)
