"""What a command spends: seconds, CPU seconds, CPU seconds of the embedded Postgres, and peak memory."""

import os
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import psutil

from benchmarks.meter import cpu_seconds_of, find_postgres

_INTERVAL_SECONDS = 0.02
_INTERVALS_OF_CHILDREN = 10
"""The children are looked for less often, because each search reads all processes of the machine."""

_SETTINGS = ("FHIR_", "DB_", "DAGSTER")


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds; CPU seconds of a process and its children; those of Postgres; and the peak memory without Postgres."""

    seconds: float
    own: float
    postgres: float = 0.0
    peak_mib: float = 0.0

    @property
    def processor(self) -> float:
        """The CPU seconds of all: the process, its children and Postgres."""
        return self.own + self.postgres

    def __str__(self) -> str:
        words = [f"{self.seconds:.2f} s", f"{self.processor:.2f} s CPU"]
        if self.postgres:
            words.append(f"Postgres {self.postgres / self.processor:.0%}")
        if self.peak_mib:
            words.append(f"{self.peak_mib:,.0f} MiB")
        return ", ".join(words)


def run(
    command: Sequence[str], settings: Mapping[str, str] | None = None, *, home: Path | None = None, exit_code: int = 0
) -> tuple[bytes, Spent]:
    """Run a command in a process of its own. Return what it printed, and what it spent.

    It has no other settings of fhir_assets than ``settings``. ``home`` has the embedded Postgres whose CPU time counts.
    Raises SystemExit if the command does not end with ``exit_code``: there is nothing to measure.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}
    postgres = find_postgres(home) if home else None
    postgres_before = cpu_seconds_of(postgres) if postgres else 0.0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    with subprocess.Popen(command, env={**inherited, **(settings or {})}, stdout=subprocess.PIPE) as process:
        watch = _Watch(process.pid)
        output, _ = process.communicate()
    seconds = time.perf_counter() - started
    watch.join()
    if process.returncode != exit_code:
        raise SystemExit(f"{' '.join(command)[:200]}: exit code {process.returncode}: there is nothing to measure")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    in_postgres = cpu_seconds_of(postgres) - postgres_before if postgres else 0.0
    return output, Spent(seconds, own, in_postgres, watch.peak / 2**20)


class _Watch(Thread):
    """Records the peak memory of a process and its children, in bytes, until the process ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pid = pid
        self.start()

    def run(self) -> None:
        children = tick = 0
        with suppress(psutil.Error):
            process = psutil.Process(self._pid)
            while memory := process.memory_info().rss:
                if tick % _INTERVALS_OF_CHILDREN == 0:
                    children = sum(map(_resident, process.children(recursive=True)))
                self.peak = max(self.peak, memory + children)
                tick += 1
                time.sleep(_INTERVAL_SECONDS)


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0
