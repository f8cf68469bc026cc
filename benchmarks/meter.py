"""CPU and memory of a load, part by part: of its own process with its workers, and of the embedded Postgres."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import dagster as dg
import psutil

_EVERY = 0.2


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of the clock, and of CPU in the load's processes and in Postgres'."""

    seconds: float = 0
    load: float = 0
    postgres: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.load + other.load, self.postgres + other.postgres)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds - other.seconds, self.load - other.load, self.postgres - other.postgres)


class Meter:
    """Of this process, and of the Postgres that runs in ``home``. ``hear`` is a listener of a run's events. A child
    process ``apart`` does not count.
    """

    def __init__(self, home: Path, *, apart: int | None = None) -> None:
        self._apart = apart
        pid = (home / "postgres").resolve() / "postmaster.pid"
        self._postgres = psutil.Process(int(pid.read_text().split()[0]))
        self._own = psutil.Process()
        self._begun: dict[str, Cost] = {}
        self.parts: defaultdict[str, Cost] = defaultdict(Cost)
        self.peak_own = self.peak_workers = 0

    def hear(self, event: dg.EventLogEntry) -> None:
        """Count a step to its layer. Steps of a run in process follow one another."""
        key = event.step_key
        if key and event.dagster_event_type is dg.DagsterEventType.STEP_START:
            self._begun[key] = self._now()
        elif key in self._begun and event.dagster_event_type is dg.DagsterEventType.STEP_SUCCESS:
            self.parts[key.split("__")[0]] += self._now() - self._begun.pop(key)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done meanwhile."""
        begun = self._now()
        yield
        self.parts[name] += self._now() - begun

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the memory in use now and then, in bytes: ``peak_own``, ``peak_workers`` of all together."""
        over = Event()
        thread = Thread(target=self._watch, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _watch(self, over: Event) -> None:
        while not over.wait(_EVERY):
            self.peak_own = max(self.peak_own, self._own.memory_info().rss)
            self.peak_workers = max(self.peak_workers, sum(map(_resident, self._own.children(recursive=True))))

    def _now(self) -> Cost:
        return Cost(time.perf_counter(), _cpu(self._own, self._apart), _cpu(self._postgres))


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def _cpu(process: psutil.Process, apart: int | None = None) -> float:
    """Of a process, those of its children that have ended, and those that live; without one that is ``apart``."""
    times = process.cpu_times()
    found = times.user + times.system + times.children_user + times.children_system
    for child in process.children(recursive=True):
        if child.pid == apart:
            continue
        with suppress(psutil.Error):
            its = child.cpu_times()
            found += its.user + its.system
    return float(found)
