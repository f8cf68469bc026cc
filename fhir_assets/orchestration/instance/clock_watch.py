"""The end of a process whose clock was set back while it waits by that clock: Dagster's daemon.

The loops of the daemon compute from the wall clock how long to wait. A clock that is set back by two hours while a loop
is at work makes it wait for two hours, even if the clock is right again a second later: no sensor is evaluated, no file
is loaded, no alert is sent. What runs the daemon starts it again, as after any other end.
"""

import logging
import os
import signal
import time
from collections.abc import Callable
from threading import Event, Lock, Thread

STEP_SECONDS = 60.0
"""The clock may be set back by less: the loops then wait that much longer."""

CHECK_SECONDS = 0.5
"""A clock that is set back and right again within this time may not be noticed."""

_log = logging.getLogger(__name__)


class ClockWatch:
    """Compares the wall clock with the monotonic clock."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._difference = wall() - monotonic()

    def measure_step(self) -> float:
        """Return by how many seconds the wall clock was set since the last call; negative if it was set back."""
        before, self._difference = self._difference, self._wall() - self._monotonic()
        return self._difference - before


class ClockGuard:
    """Ends this process with SIGTERM when its clock is set back. ``start`` may be called any number of times."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._started = False

    def start(self) -> None:
        """Watch the clock in a thread from now on."""
        with self._lock:
            if not self._started:
                self._started = True
                Thread(target=_guard, args=[ClockWatch()], name="clock-guard", daemon=True).start()


def _guard(watch: ClockWatch) -> None:
    pause = Event()
    while not pause.wait(CHECK_SECONDS):
        step = watch.measure_step()
        if step <= -STEP_SECONDS:
            _log.warning(
                "the clock was set back: this process ends and has to be started again, because it would wait for as "
                "long before it evaluates the next sensor",
                extra={"seconds": round(-step)},
            )
            os.kill(os.getpid(), signal.SIGTERM)
            return
