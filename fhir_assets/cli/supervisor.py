"""Runs processes side by side and restarts those that exit."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic, sleep

import psutil

from fhir_assets.errors import ConfigurationError
from fhir_assets.process_ends import MemoryKills, describe_exit, name_exit, read_memory_kills

CHECK_SECONDS = 1.0
"""Seconds between two checks of the processes."""

WATCH_SECONDS = 5.0
"""Seconds between two calls of the ``watched`` functions."""

SHORT_SECONDS = 10.0
"""A process that exits within this time after its start counts as failed to start."""

MAX_SHORT_LIVES = 5
"""The number of times in a row that a process may fail to start."""

_CHECKS_WITHOUT_CHILD = 5
"""A process that needs a child is restarted after this many consecutive checks without one."""

_CHECKS_BEFORE_CHILD = 60
"""As ``_CHECKS_WITHOUT_CHILD``, for a process that no check has seen with a child: it may be starting, or its child may
have ended between two checks.
"""


@dataclass(frozen=True)
class Service:
    """A process that must always run. ``needs_child`` is True if it is useless without its child process.

    An ``optional`` service that exits repeatedly after its start is left out; any other ends the command.
    """

    name: str
    command: Sequence[str]
    needs_child: bool = False
    optional: bool = False


@dataclass
class _Running:
    service: Service
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=monotonic)
    had_child: bool = False
    checks_without_child: int = 0
    short_lives: int = 0
    kills_before: MemoryKills = field(default_factory=read_memory_kills)

    def find_fault(self) -> str | None:
        """Return why the process must be restarted, or None."""
        code = self.process.poll()
        if code is not None:
            return name_exit(code)
        if self.service.needs_child and not self._has_child():
            return "lost the process that does its work"
        return None

    def explain(self, fault: str) -> str:
        """Return a fault that ``find_fault`` returned, with the reason of a kill as far as it can be known."""
        code = self.process.poll()
        return describe_exit(code, before=self.kills_before) if code == -signal.SIGKILL else fault

    def _has_child(self) -> bool:
        try:
            children = psutil.Process(self.process.pid).children()
            alive = any(child.status() != psutil.STATUS_ZOMBIE for child in children)
        except psutil.NoSuchProcess:
            alive = False
        self.had_child |= alive
        self.checks_without_child = 0 if alive else self.checks_without_child + 1
        return self.checks_without_child < (_CHECKS_WITHOUT_CHILD if self.had_child else _CHECKS_BEFORE_CHILD)


class Supervisor:
    """Starts services in order and keeps them running until ``run`` is interrupted.

    ``report`` prints a message about each process that is restarted. Each service is the leader of a process group,
    which is stopped together with it.
    """

    def __init__(self, environment: Mapping[str, str], report: Callable[[str], None]) -> None:
        self._environment = dict(environment)
        self._report = report
        self._running: list[_Running] = []

    def start(self, service: Service) -> None:
        """Start a service."""
        self._running.append(_Running(service, self._open(service)))

    def check(self) -> None:
        """Restart the services that have exited.

        Raises ConfigurationError if one that is not optional exits repeatedly after its start.
        """
        for running in list(self._running):
            fault = running.find_fault()
            if fault is not None:
                self._replace(running, fault)

    def _replace(self, running: _Running, fault: str) -> None:
        service, index = running.service, self._running.index(running)
        short_lives = running.short_lives + 1 if monotonic() - running.started < SHORT_SECONDS else 0
        if short_lives >= MAX_SHORT_LIVES:
            message = (
                f"{service.name} {fault} {short_lives} times within {SHORT_SECONDS:.0f} s of its start: its messages "
                "are above. Correct what they name, then run the command again"
            )
            if not service.optional:
                raise ConfigurationError(message)
            self._report(f"{message}. Everything else goes on without it")
            _stop(running.process)
            del self._running[index]
            return
        self._report(f"{service.name} (process {running.process.pid}) {running.explain(fault)}: restarting it")
        _stop(running.process)
        self._running[index] = _Running(service, self._open(service), short_lives=short_lives)

    def run(self, *watched: Callable[[], None]) -> None:
        """Check the services, and call the ``watched`` functions regularly, until KeyboardInterrupt.

        Raises ConfigurationError as ``check`` does.
        """
        watched_at = monotonic()
        while True:
            self.check()
            if monotonic() - watched_at >= WATCH_SECONDS:
                for watch in watched:
                    watch()
                watched_at = monotonic()
            sleep(CHECK_SECONDS)

    def stop(self) -> None:
        """Stop all services, the last one first."""
        while self._running:
            _stop(self._running.pop().process)

    def _open(self, service: Service) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            list(service.command),
            env=self._environment,
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )


_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of <linux/prctl.h>."""


def _end_with_parent() -> None:
    """Let this process receive SIGTERM when the supervisor ends in any way: two daemons would repeat each other."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


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
