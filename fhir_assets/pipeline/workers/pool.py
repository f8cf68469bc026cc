"""A pool of worker processes, which validate batches of lines and build rows on all cores of the machine.

A worker is ``python -m fhir_assets.pipeline.workers.process``, connected by two pipes. It is not forked, because
Dagster has threads, and it ends at the end of its input, even if its parent was killed.

A ``ProcessPoolExecutor`` with the ``spawn`` method is as fast once it runs, but every one of its workers first imports
the parent's ``__main__`` again, which is the command line or the code server with all of Dagster: 20,000 resources took
about twice the processor time. It also does not report the exit code of a lost worker, and one lost worker fails the
work of every run that shares the pool.
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
from fhir_assets.process_ends import describe_exit, read_memory_kills

Context = TypeVar("Context")
Item = TypeVar("Item")
Result = TypeVar("Result")

Job = Callable[[Item], Result]
"""Processes one item. A job is pickled with its rules, views and keys, and unpickled once in each worker."""

UNIT_BYTES = 1 << 20
"""Items are sent to a worker in units of at least this many bytes."""

MIN_SECONDS_TO_START = 1.0
"""Processes are started once this many seconds of work were requested in total."""

MIN_SECONDS_TO_SHARE = 0.1
"""Work of fewer seconds is done in this process."""

_SECONDS_TO_END = 5.0
"""The time that a worker may take to end after its pipes were closed."""

_UNITS_PER_WORKER = 2
"""The maximum number of units for each worker in memory. Further units are sent when results are consumed."""


class WorkerPool:
    """A pool of ``count`` worker processes, shared by all runs in this process.

    Workers start when enough work was requested. With a count of 1 all work is done in this process.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._requested_seconds = 0.0
        self._idle: deque[WorkerProcess] = deque()
        self._threads: ThreadPoolExecutor | None = None
        self._finalizer = finalize(self, _close_all, self._idle)

    def map(
        self,
        job: Job[Item, Result],
        items: Iterable[tuple[Context, Item]],
        *,
        weigh: Callable[[Item], int],
        seconds: float,
    ) -> Iterator[tuple[Context, Item, Result]]:
        """Yield each context, item and result of the job in the order of the items. Contexts are not sent to workers.

        ``weigh`` returns the size of an item in bytes. ``seconds`` is the estimated time of all items: little work is
        done in this process.

        Raises the errors of the job if they are FhirAssetsErrors, PermanentError for any other error of the job, or
        WorkerLost if a worker process ended.
        """
        self._requested_seconds += seconds
        if self.count < 2 or seconds < MIN_SECONDS_TO_SHARE or self._requested_seconds < MIN_SECONDS_TO_START:
            for context, item in items:
                yield context, item, job(item)
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.count, thread_name_prefix="worker")
        packed = pickle.dumps(job)
        waiting: deque[tuple[list[tuple[Context, Item]], Future[list[Result]]]] = deque()

        def take_first() -> Iterator[tuple[Context, Item, Result]]:
            unit, future = waiting.popleft()
            for (context, item), result in zip(unit, future.result(), strict=True):
                yield context, item, result

        try:
            for unit in _group_into_units(items, weigh):
                waiting.append((unit, self._threads.submit(self._ask, packed, [item for _, item in unit])))
                if len(waiting) > _UNITS_PER_WORKER * self.count:
                    yield from take_first()
            while waiting:
                yield from take_first()
        finally:
            for _, future in waiting:
                future.cancel()

    def close(self) -> None:
        """End all idle workers. The next work starts new ones."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        _close_all(self._idle)

    def _ask(self, job: bytes, items: list[Any]) -> list[Any]:
        """Send a unit of work to an idle worker, wait in a thread of its own for the results, and return them."""
        worker = self._take_worker()
        answer = worker.ask(job, items)
        self._idle.append(worker)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _take_worker(self) -> "WorkerProcess":
        """Return an idle worker that still runs, or a new one."""
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return WorkerProcess()
            if not worker.has_ended():
                return worker
            worker.close()


class WorkerProcess:
    """One worker process and the pipes to it."""

    def __init__(self) -> None:
        self._kills_before = read_memory_kills()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fhir_assets.pipeline.workers.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()

    def has_ended(self) -> bool:
        """Return whether the process ended while it was idle."""
        return self._process.poll() is not None

    def ask(self, job: bytes, items: list[Any]) -> list[Any] | FhirAssetsError:
        """Send a pickled job with items, and return the results or the error of the job. Raises WorkerLost."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((job, items), self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
            answer: list[Any] | FhirAssetsError = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            reason = self._describe_end()
            self.close()
            raise WorkerLost(f"a worker process {reason}. These windows are unchanged: run them again") from None
        return answer

    def _describe_end(self) -> str:
        """Return why the process does not answer; end it if it still runs."""
        try:
            code = self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return "gave no answer that can be read: report this, it is a defect"
        return describe_exit(code, before=self._kills_before)

    def close(self) -> None:
        """Close the pipes and wait until the process ends, which it does at the end of its input."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _close_all(workers: "deque[WorkerProcess]") -> None:
    while workers:
        workers.pop().close()


def _group_into_units(
    items: Iterable[tuple[Context, Item]], weigh: Callable[[Item], int]
) -> Iterator[list[tuple[Context, Item]]]:
    """Group items into units of at least UNIT_BYTES bytes."""
    unit: list[tuple[Context, Item]] = []
    size = 0
    for item in items:
        unit.append(item)
        size += weigh(item[1])
        if size >= UNIT_BYTES:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit
