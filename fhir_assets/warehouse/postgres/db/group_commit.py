"""Work that costs as much for many as for one: what several threads ask for at the same time is done together.

A commit is the example: while one is written to disk, those who come wait, and the next one is for all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True)
class _Asked(Generic[Item, Result]):
    item: Item
    done: bool = False
    result: Result | None = None
    error: Exception | None = None


class GroupCommit(Generic[Item, Result]):
    """Gives ``work`` all that has been asked for since it was last begun, at most ``most`` at once, and each asker its
    own result. ``work`` gives as many results as it got items; what it raises, all that asked hear.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Sequence[Result]], *, most: int = 64) -> None:
        self._work = work
        self._most = most
        self._waiting: list[_Asked[Item, Result]] = []
        self._lock = Lock()
        self._working = Lock()

    def do(self, item: Item) -> Result:
        """Return when it is done. Raises what ``work`` raises."""
        asked = _Asked[Item, Result](item)
        with self._lock:
            self._waiting.append(asked)
        # Whoever gets in first works for all who wait; the others find theirs done when they get in.
        with self._working:
            while not asked.done:
                with self._lock:
                    batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
                self._run(batch)
        if asked.error is not None:
            raise asked.error
        return cast(Result, asked.result)

    def _run(self, batch: Sequence[_Asked[Item, Result]]) -> None:
        try:
            results = self._work([each.item for each in batch])
            for each, result in zip(batch, results, strict=True):
                each.result = result
        except Exception as error:
            for each in batch:
                each.error = error
        for each in batch:
            each.done = True
