"""A clock that can be set while processes run, by libfaketime (Debian's package ``faketime``)."""

import os
from collections.abc import Mapping
from pathlib import Path

_LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))

# With a monotonic clock that goes on, libfaketime 0.9.10 makes clock_nanosleep fail, with which time.sleep waits.
_SLEEP = """
import threading, time
time.sleep = lambda seconds: threading.Event().wait(seconds) and None
"""


class SteppedClock:
    """The wall clock of the Python processes that have ``environment``; their monotonic clock goes on.

    Without libfaketime ``environment`` is empty, and nothing can be stepped.
    """

    def __init__(self, folder: Path) -> None:
        self._offset = folder / "clock"
        self.step(0)
        self.environment: Mapping[str, str] = {}
        if _LIBRARIES:
            modules = folder / "modules"
            modules.mkdir()
            (modules / "sitecustomize.py").write_text(_SLEEP)
            self.environment = {
                "LD_PRELOAD": str(_LIBRARIES[0]),
                "FAKETIME_TIMESTAMP_FILE": str(self._offset),
                "FAKETIME_CACHE_DURATION": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, (str(modules), os.environ.get("PYTHONPATH")))),
            }

    def step(self, seconds: int) -> None:
        """Set the clock to so many seconds after the true time, within a second."""
        unfinished = self._offset.with_suffix(".new")
        unfinished.write_text(f"{seconds:+d}\n")
        unfinished.replace(self._offset)
