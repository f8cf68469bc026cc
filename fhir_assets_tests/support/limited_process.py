"""A process with limits of memory and time, which the kernel enforces, for what reads hostile content.

It reads lines with a task as JSON, and answers each with a line of JSON: the outcome.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from queue import Empty, Queue
from threading import Thread
from typing import Any

from fhir_assets.errors import FhirAssetsError

END_SECONDS = 60
"""Far more than the limits of the project allow: a call that takes longer has no end."""

_MEMORY_BYTES = 500 * 2**20


class LimitedProcess:
    """A process that runs ``module``, whose ``main`` calls ``answer_tasks``. It is started again if it is lost."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[str] | None = None
        self._lines: Queue[str] = Queue()

    def run(self, road: str, **task: Any) -> str:
        """Return the outcome of a task: ``ok``, ``told`` and an error of the project, ``no end``, or a traceback."""
        if self._process is None:
            self._lines = Queue()
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"road": road} | task) + "\n")
        self._process.stdin.flush()
        try:
            return str(json.loads(self._lines.get(timeout=2 * END_SECONDS))["outcome"])
        except (Empty, ValueError):
            self.stop()
            return "no end"

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "MALLOC_ARENA_MAX": "2"},  # each further arena reserves addresses that are not used
        )
        Thread(target=self._read, args=(self._process, self._lines), daemon=True).start()

    def _read(self, process: "subprocess.Popen[str]", lines: Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def answer_tasks(run: Callable[[dict[str, Any]], object]) -> None:
    """Answer tasks until the input ends. What needs too much memory fails, and what has no end is killed."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY_BYTES, used + _MEMORY_BYTES))
    for line in sys.stdin:
        signal.alarm(END_SECONDS)
        try:
            run(json.loads(line))
            outcome = "ok"
        except FhirAssetsError as error:
            outcome = f"told {error}"
        except BaseException:
            outcome = traceback.format_exc()
        signal.alarm(0)
        print(json.dumps({"outcome": outcome}), flush=True)
