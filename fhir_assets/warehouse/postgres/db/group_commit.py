"""Group commit: requests of several threads are processed in batches.

This is faster if a batch takes as long as a single request. Requests that arrive while a commit is written to the disk
share the next commit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True)
class _Request(Generic[Item, Result]):
    item: Item
    done: bool = False
    result: Result | None = None
    error: Exception | None = None


class GroupCommit(Generic[Item, Result]):
    """Calls ``work`` with the items that were submitted since its last call, up to ``max_items``.

    ``work`` returns one result for each item, in the same order. An error is raised to every caller of the batch.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Sequence[Result]], *, max_items: int = 64) -> None:
        self._work = work
        self._max_items = max_items
        self._waiting: list[_Request[Item, Result]] = []
        self._lock = Lock()
        self._working = Lock()

    def submit(self, item: Item) -> Result:
        """Submit an item, wait for its batch and return the result of the item. Raises what ``work`` raises."""
        request = _Request[Item, Result](item)
        with self._lock:
            self._waiting.append(request)
        # The first thread to get the lock processes all waiting items; the others then find their items done.
        with self._working:
            while not request.done:
                with self._lock:
                    batch, self._waiting = self._waiting[: self._max_items], self._waiting[self._max_items :]
                self._run(batch)
        if request.error is not None:
            raise request.error
        return cast(Result, request.result)

    def _run(self, batch: Sequence[_Request[Item, Result]]) -> None:
        try:
            results = self._work([request.item for request in batch])
            for request, result in zip(batch, results, strict=True):
                request.result = result
        except Exception as error:
            for request in batch:
                request.error = error
        for request in batch:
            request.done = True
