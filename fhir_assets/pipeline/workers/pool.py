"""All cores of the machine: worker processes that judge batches of lines and make rows of them.

A worker is ``python -m fhir_assets.pipeline.workers.process`` at the other end of two pipes: nothing is forked (Dagster
has threads), nobody's ``__main__`` is run again, and a worker ends by itself when its parent is gone, however it went.
"""

import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar
from weakref import finalize

from fhir_assets.errors import FhirAssetsError, WorkerLost

Context = TypeVar("Context")
Item = TypeVar("Item")
Result = TypeVar("Result")

Job = Callable[[Item], Result]
"""What is done with an item. It pickles with all that it needs (rules, views, keys), and is unpickled once a worker."""

UNIT_BYTES = 1 << 20
"""Smaller items travel together."""

WORTH_A_START = 1.0
"""Seconds of work, all that was asked for so far, for which processes are started."""

WORTH_A_TRIP = 0.1
"""Seconds of work that is shared at all."""

_IN_FLIGHT = 2
"""Units a worker that are given out at most before the first of them is taken back."""


class WorkerPool:
    """Some processes, shared by all that runs in this one. They start when there is enough work, and never with one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._asked = 0.0
        self._idle: deque[_Worker] = deque()
        self._threads: ThreadPoolExecutor | None = None
        self._finalizer = finalize(self, _close, self._idle)

    def map(
        self,
        job: Job[Item, Result],
        items: Iterable[tuple[Context, Item]],
        *,
        weigh: Callable[[Item], int],
        seconds: float,
    ) -> Iterator[tuple[Context, Item, Result]]:
        """What the job makes of each item, in their order; the contexts stay here. ``weigh`` gives the bytes of an
        item; ``seconds`` is about what all of them take: little work is done in this process.

        Raises what the job raises, or WorkerLost if a process died.
        """
        self._asked += seconds
        if self.count < 2 or seconds < WORTH_A_TRIP or self._asked < WORTH_A_START:
            for context, item in items:
                yield context, item, job(item)
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.count, thread_name_prefix="worker")
        packed = pickle.dumps(job)
        waiting: deque[tuple[list[tuple[Context, Item]], Future[list[Result]]]] = deque()

        def taken_back() -> Iterator[tuple[Context, Item, Result]]:
            unit, future = waiting.popleft()
            for (context, item), result in zip(unit, future.result(), strict=True):
                yield context, item, result

        try:
            for unit in _units(items, weigh):
                waiting.append((unit, self._threads.submit(self._ask, packed, [item for _, item in unit])))
                if len(waiting) > _IN_FLIGHT * self.count:
                    yield from taken_back()
            while waiting:
                yield from taken_back()
        finally:
            for _, future in waiting:
                future.cancel()

    def close(self) -> None:
        """End the processes that have nothing to do; the next work starts new ones."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        _close(self._idle)

    def _ask(self, job: bytes, items: list[Any]) -> list[Any]:
        """Have an idle process do a unit of work. One thread a process waits here."""
        worker = self._worker()
        answer = worker.ask(job, items)
        self._idle.append(worker)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _worker(self) -> "_Worker":
        """An idle process that is still there, or a new one."""
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return _Worker()
            if not worker.is_gone():
                return worker
            worker.close()


class _Worker:
    """One process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fhir_assets.pipeline.workers.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def is_gone(self) -> bool:
        """Whether the process ended by itself while it had nothing to do."""
        return self._process.poll() is not None

    def ask(self, job: bytes, items: list[Any]) -> list[Any] | FhirAssetsError:
        """Send work and wait for what came of it. Raises WorkerLost."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((job, items), self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
            answer: list[Any] | FhirAssetsError = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            self._process.kill()
            code = self._process.wait()
            self.close()
            raise WorkerLost(
                f"a worker process ended in mid-work ({_how(code)}): nothing of these windows is kept; run them again, "
                "with fewer FHIR_WORKERS if the machine has too little memory"
            ) from None
        return answer

    def close(self) -> None:
        """Let the process end: at the end of its input it does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _close(workers: "deque[_Worker]") -> None:
    while workers:
        workers.pop().close()


def _how(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _units(items: Iterable[tuple[Context, Item]], weigh: Callable[[Item], int]) -> Iterator[list[tuple[Context, Item]]]:
    """Items in groups of at least UNIT_BYTES."""
    unit: list[tuple[Context, Item]] = []
    held = 0
    for item in items:
        unit.append(item)
        held += weigh(item[1])
        if held >= UNIT_BYTES:
            yield unit
            unit, held = [], 0
    if unit:
        yield unit
