"""Commands in processes of their own that are killed in the middle of a write, or that find the disk full.

The processes are forked from one that has imported the command line, which takes longer than most commands.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

Mishap = Literal["none", "killed", "full"]

FULL_AT_BYTES = 300
"""The size of a file at which the disk of a command is full."""

_PARENT = """
import importlib, json, os, resource, signal, sys, time, warnings
import fhir_assets.definitions, pyarrow.parquet, psycopg
from fhir_assets.cli import main

def kill_at(place, number):
    module, _, path = place.partition(":")
    owner = importlib.import_module(module)
    *classes, name = path.split(".")
    for each in classes:
        owner = getattr(owner, each)
    original, calls = getattr(owner, name), []

    def call(*arguments, **options):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, call)

def wait(child, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)

def run(job):
    os.setsid()
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for descriptor, path in ((1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    if job["full_at"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["full_at"], job["full_at"]))
    if job["kill_at"]:
        kill_at(*job["kill_at"])
    sys.argv = ["fhir-assets", *job["arguments"]]
    main()

for line in sys.stdin:
    job = json.loads(line)
    with warnings.catch_warnings(action="ignore"):
        child = os.fork()
    if not child:
        code = 70
        try:
            run(job)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        finally:
            os._exit(code)
    if job["kill_after"] is not None:
        wait(child, job["kill_after"])
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """The end of a command: its exit code, negative for a signal, and what it printed."""

    code: int
    stdout: str
    stderr: str


class Commands:
    """Runs ``fhir-assets`` commands."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def __call__(
        self,
        *arguments: str,
        folder: Path,
        mishap: Mishap = "none",
        environment: Mapping[str, str] | None = None,
        stdout: Path | None = None,
        kill_at: tuple[str, int] = ("os:fsync", 1),
        kill_after: float | None = None,
    ) -> Ended:
        """Run a command in ``folder``.

        ``killed``: SIGKILL ends it at a call of a function, ``kill_at``: its module and name, and the number of the
        call. By default, that is when all content of the first file is written and none is flushed. ``full``: the
        kernel refuses to write more than FULL_AT_BYTES to any file. ``stdout`` is an existing file that it prints to.
        With ``kill_after``, SIGKILL ends it and its processes after so many seconds, wherever it is.
        """
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("FHIR_", "DB_", "PHI_"))}
        variables = {**clean, "FHIR_ASSETS_HOME": str(folder / "home"), "NO_COLOR": "1", **(environment or {})}
        with tempfile.NamedTemporaryFile() as printed, tempfile.NamedTemporaryFile() as said:
            job = {
                "arguments": arguments,
                "environment": variables,
                "folder": str(folder),
                "full_at": FULL_AT_BYTES if mishap == "full" else None,
                "kill_at": kill_at if mishap == "killed" else None,
                "kill_after": kill_after,
                "stdout": str(stdout or printed.name),
                "stderr": said.name,
            }
            assert self._process.stdin
            assert self._process.stdout
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            return Ended(code, printed.read().decode(), said.read().decode())


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    """Commands in processes of their own."""
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Commands(process)
        assert process.stdin
        process.stdin.close()


def content_of(folder: Path) -> dict[str, bytes]:
    """Return the content of the files of a folder and below by path, without the unfinished files of a kill."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".tmp")
    }


def unfinished_files(folder: Path) -> list[Path]:
    """Return the files in a folder and below that were not finished."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name.endswith(".tmp")]
