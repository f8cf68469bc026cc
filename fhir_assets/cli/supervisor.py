"""Runs processes side by side, and starts one again that ends on its own."""

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic, sleep

import psutil

from fhir_assets.errors import ConfigurationError

CHECK_SECONDS = 1.0
"""Seconds between two looks at the processes."""

WATCH_SECONDS = 5.0
"""Seconds between two looks at what else must be up."""

SHORT_SECONDS = 10.0
"""A process that ends within this time after its start counts as one that does not start."""

MAX_SHORT_LIVES = 5
"""The number of times in a row that a process may fail to start."""

_LOOKS_WITHOUT_CHILD = 5
"""A process that needs a child is started again after so many looks in a row without one."""


@dataclass(frozen=True)
class Service:
    """A process that always runs. ``needs_child`` states that it is of no use without its child process."""

    name: str
    command: Sequence[str]
    needs_child: bool = False


@dataclass
class _Running:
    service: Service
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=monotonic)
    had_child: bool = False
    looks_without_child: int = 0
    short_lives: int = 0

    def find_fault(self) -> str | None:
        """Return why the process must be started again, or None."""
        code = self.process.poll()
        if code is not None:
            return f"was ended by {_describe_signal(-code)}" if code < 0 else f"ended with exit code {code}"
        if self.service.needs_child and not self._has_child():
            return "lost the process that does its work"
        return None

    def _has_child(self) -> bool:
        try:
            children = psutil.Process(self.process.pid).children()
            alive = any(child.status() != psutil.STATUS_ZOMBIE for child in children)
        except psutil.NoSuchProcess:
            alive = False
        self.had_child |= alive
        self.looks_without_child = 0 if alive or not self.had_child else self.looks_without_child + 1
        return self.looks_without_child < _LOOKS_WITHOUT_CHILD


class Supervisor:
    """Starts services in their order and keeps them running until ``run`` is interrupted.

    ``report`` prints a sentence about each process that is started again. Each service is the leader of a process
    group, which ends with it.
    """

    def __init__(self, environment: Mapping[str, str], report: Callable[[str], None]) -> None:
        self._environment = dict(environment)
        self._report = report
        self._running: list[_Running] = []

    def start(self, service: Service) -> None:
        """Start a service."""
        self._running.append(_Running(service, self._open(service)))

    def check(self) -> None:
        """Start the services again that have ended. Raises ConfigurationError if one does not stay up."""
        for index, running in enumerate(self._running):
            fault = running.find_fault()
            if fault is None:
                continue
            name = running.service.name
            short_lives = running.short_lives + 1 if monotonic() - running.started < SHORT_SECONDS else 0
            if short_lives >= MAX_SHORT_LIVES:
                raise ConfigurationError(
                    f"{name} {fault} {short_lives} times within {SHORT_SECONDS:.0f} s of its start: its messages are "
                    "above. Correct what they name, then run the command again"
                )
            self._report(f"{name} (process {running.process.pid}) {fault}: it is started again")
            _stop(running.process)
            self._running[index] = _Running(running.service, self._open(running.service), short_lives=short_lives)

    def run(self, *watched: Callable[[], None]) -> None:
        """Check the services, and call ``watched`` now and then, until KeyboardInterrupt. Raises as ``check``."""
        looked = monotonic()
        while True:
            self.check()
            if monotonic() - looked >= WATCH_SECONDS:
                for watch in watched:
                    watch()
                looked = monotonic()
            sleep(CHECK_SECONDS)

    def stop(self) -> None:
        """Stop all services, the last one first."""
        while self._running:
            _stop(self._running.pop().process)

    def _open(self, service: Service) -> subprocess.Popen[bytes]:
        return subprocess.Popen(list(service.command), env=self._environment, start_new_session=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the process and its children: with SIGINT, then SIGTERM, then SIGKILL.

    Children that outlive a killed process are stopped too.
    """
    for sign, seconds in ((signal.SIGINT, 15.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        deadline = monotonic() + seconds
        while monotonic() < deadline and _group_lives(process):
            sleep(0.05)


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _describe_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
