"""Measure the CPU and memory of a load by part: of its process and workers, and of the embedded Postgres."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import dagster as dg
import psutil

_INTERVAL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Cost:
    """Elapsed seconds, and CPU seconds of the load's processes and of Postgres."""

    seconds: float = 0
    load: float = 0
    postgres: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.load + other.load, self.postgres + other.postgres)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds - other.seconds, self.load - other.load, self.postgres - other.postgres)


class Meter:
    """Measures this process with its children, and the Postgres in ``home``. A child with the process id ``excluded``
    is not counted. ``listen`` is a listener of a run's events.
    """

    def __init__(self, home: Path, *, excluded: int | None = None) -> None:
        self._excluded = excluded
        self._postgres = find_postgres(home)
        self._own = psutil.Process()
        self._started: dict[str, Cost] = {}
        self.parts: defaultdict[str, Cost] = defaultdict(Cost)
        self.peak_own = self.peak_workers = 0

    def listen(self, event: dg.EventLogEntry) -> None:
        """Add the cost of a step to its layer. The steps of an in-process run are executed one after another."""
        key = event.step_key
        if key and event.dagster_event_type is dg.DagsterEventType.STEP_START:
            self._started[key] = self._now()
        elif key in self._started and event.dagster_event_type is dg.DagsterEventType.STEP_SUCCESS:
            self.parts[key.split("__")[0]] += self._now() - self._started.pop(key)

    @contextmanager
    def measure_part(self, name: str) -> Iterator[None]:
        """Add the cost of the block to a part."""
        started = self._now()
        yield
        self.parts[name] += self._now() - started

    @contextmanager
    def record_peaks(self) -> Iterator[None]:
        """Record the peak memory during the block, in bytes: ``peak_own``, and ``peak_workers`` of all workers."""
        stop = Event()
        thread = Thread(target=self._watch, args=(stop,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _watch(self, stop: Event) -> None:
        while not stop.wait(_INTERVAL_SECONDS):
            self.peak_own = max(self.peak_own, self._own.memory_info().rss)
            self.peak_workers = max(self.peak_workers, sum(map(_resident, self._own.children(recursive=True))))

    def _now(self) -> Cost:
        own = cpu_seconds_of(self._own, self._excluded)
        return Cost(time.perf_counter(), own, cpu_seconds_of(self._postgres))


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def find_postgres(home: Path) -> psutil.Process:
    """Return the main process of the embedded Postgres in ``home``, which must run."""
    pid = (home / "postgres").resolve() / "postmaster.pid"
    return psutil.Process(int(pid.read_text().split()[0]))


def cpu_seconds_of(process: psutil.Process, excluded: int | None = None) -> float:
    """Return the CPU seconds of a process and its ended and running children, without the child ``excluded``."""
    times = process.cpu_times()
    seconds = times.user + times.system + times.children_user + times.children_system
    for child in process.children(recursive=True):
        if child.pid == excluded:
            continue
        with suppress(psutil.Error):
            child_times = child.cpu_times()
            seconds += child_times.user + child_times.system
    return float(seconds)
