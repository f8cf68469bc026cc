"""Two operations at once, in an order that a test chooses: the first stops at a point until the second has run.

Nothing depends on time: the first operation goes on when the second has ended or waits for a lock of Postgres.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import sleep
from typing import Any

import psycopg
import pytest

_POLL_SECONDS = 0.01
_PATIENCE_SECONDS = 120.0


class Killed(BaseException):
    """The end of an operation at the point at which it stopped: its open transactions are rolled back."""


@dataclass(frozen=True, slots=True)
class Point:
    """A call at which the first operation stops: before it, or after it."""

    owner: Any
    name: str
    after: bool = False


@dataclass
class Outcome:
    """What became of the two operations: their errors, and whether the second one waited for a lock of the first."""

    waited: bool = False
    errors: list[BaseException | None] = field(default_factory=lambda: [None, None])

    def raise_errors(self) -> None:
        """Raise the first error of an operation that was not killed."""
        for error in self.errors:
            if error is not None and not isinstance(error, Killed):
                raise error


class _Stop:
    """The stop of one thread at one call; other threads, and further calls, pass."""

    def __init__(self, *, kill: bool, break_connections: Callable[[], None] | None) -> None:
        self.reached = threading.Event()
        self.go = threading.Event()
        self.thread: threading.Thread | None = None
        self._kill = kill
        self._break_connections = break_connections

    def __call__(self) -> None:
        if threading.current_thread() is not self.thread or self.reached.is_set():
            return
        self.reached.set()
        assert self.go.wait(_PATIENCE_SECONDS)
        if self._break_connections:
            self._break_connections()
        if self._kill:
            raise Killed


def interleave(
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    first: Callable[[], object],
    point: Point,
    second: Callable[[], object],
    *,
    kill: bool = False,
    break_connections: Callable[[], None] | None = None,
    always: bool = True,
) -> Outcome:
    """Run ``first`` to ``point``, then ``second`` to its end or until it waits for a lock, then the rest of both.

    With ``kill``, the first operation ends at the point, after the second one has run or waits. ``break_connections``
    is called at that moment. Fails if the first operation never reaches the point; without ``always``, the second one
    then runs after it.
    """
    stop = _Stop(kill=kill, break_connections=break_connections)
    original = getattr(point.owner, point.name)

    def stopping(*args: Any, **options: Any) -> Any:
        if not point.after:
            stop()
        result = original(*args, **options)
        if point.after:
            stop()
        return result

    outcome = Outcome()

    def run(number: int, operation: Callable[[], object]) -> None:
        try:
            operation()
        except BaseException as error:
            outcome.errors[number] = error

    threads = [threading.Thread(target=run, args=(n, op), daemon=True) for n, op in enumerate((first, second))]
    stop.thread = threads[0]
    with monkeypatch.context() as patched:
        patched.setattr(point.owner, point.name, stopping)
        threads[0].start()
        while not stop.reached.wait(_POLL_SECONDS):
            if not threads[0].is_alive():
                assert not always or stop.reached.is_set(), f"it ended before the point: {outcome.errors[0]!r}"
                break
        threads[1].start()
        outcome.waited = _wait_for_end_or_lock(url, threads[1])
        stop.go.set()
        for thread in threads:
            thread.join(_PATIENCE_SECONDS)
            assert not thread.is_alive()
    return outcome


def _wait_for_end_or_lock(url: str, thread: threading.Thread) -> bool:
    """Wait until a thread ends, or any session of the database waits for a lock. Return True if one waits."""
    with psycopg.connect(url, autocommit=True) as conn:
        while thread.is_alive():
            row = conn.execute(
                """
                SELECT count(*)
                FROM pg_stat_activity
                WHERE datname = current_database() AND wait_event_type = 'Lock'
                """
            ).fetchone()
            if row and row[0]:
                return True
            sleep(_POLL_SECONDS)
    return False
