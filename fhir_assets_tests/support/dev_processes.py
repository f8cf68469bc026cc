"""`fhir-assets dev` as a process, and the processes that it starts."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import requests

from fhir_assets_tests.support.api import TOKENS

QUERY = """
{
  workspaceOrError { ... on Workspace { locationEntries { name locationOrLoadError { __typename } } } }
  instance { daemonHealth { allDaemonStatuses { healthy required } } }
}
"""
PARTS = {
    "The code server": r"code-server start",
    "The work of the code server": r"dagster api grpc",
    "The UI": r"dagster_webserver",
    "The daemon": r"dagster\._daemon",
    "The post loader": r"main\(\) post-loader",
    "The embedded Postgres": r"bin/postgres",
}


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def is_up(url: str) -> bool:
    """Return whether the UI has the code location and all daemons are healthy."""
    with suppress(requests.RequestException, KeyError, TypeError, ValueError):
        data = requests.post(f"{url}/graphql", json={"query": QUERY}, timeout=30).json()["data"]
        (location,) = data["workspaceOrError"]["locationEntries"]
        daemons = data["instance"]["daemonHealth"]["allDaemonStatuses"]
        return (
            location["name"] == "fhir_assets"
            and location["locationOrLoadError"]["__typename"] == "RepositoryLocation"
            and all(daemon["healthy"] for daemon in daemons if daemon["required"])
        )
    return False


def find(dev: psutil.Process, home: Path, pattern: str) -> psutil.Process | None:
    """Return the first process of ``fhir-assets dev`` whose command line matches."""
    candidates = dev.children(recursive=True)
    pid_file = (home / "postgres").resolve() / "postmaster.pid"
    if pid_file.exists():
        candidates.append(psutil.Process(int(pid_file.read_text().split()[0])))
    for process in candidates:
        with suppress(psutil.NoSuchProcess):
            if re.search(pattern, " ".join(process.cmdline())) and process.status() != psutil.STATUS_ZOMBIE:
                return process
    return None


@contextmanager
def running_dev(
    folder: Path, *options: str, **more: str
) -> Iterator[tuple["subprocess.Popen[bytes]", Callable[[], str]]]:
    """Run `fhir-assets dev` during the block. Yield its process and a function that returns what it has printed.

    ``more`` are variables of its environment.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("DAGSTER_HOME", "DAGSTER_POSTGRES_URL", "DB_URL")
    }
    environment |= {"FHIR_ASSETS_HOME": str(folder / "home"), "FHIR_RESOURCE_TYPES": "Patient", "API_TOKENS": TOKENS}
    command = [sys.executable, "-c", "from fhir_assets.cli import main; main()", "dev", *options]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment | more, stdout=log, stderr=log)
    try:
        yield process, (folder / "log").read_text
    finally:
        process.terminate()
        assert process.wait(90) == 0


def find_url(text: Callable[[], str]) -> str:
    wait_until(lambda: "Dagster UI: " in text(), text())
    return str(re.findall(r"http://127\.0\.0\.1:\d+", text())[0])
