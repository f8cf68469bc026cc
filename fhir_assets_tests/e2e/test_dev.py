"""`fhir-assets dev` goes on if any of its processes is killed."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import psutil
import pytest
import requests

from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url
from fhir_assets_tests.support.api import TOKENS
from fhir_assets_tests.support.databases import database_unavailable

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


def says_more_often(read: Callable[[], str], words: str, times: int) -> bool:
    return read().count(words) > times


@contextmanager
def running_dev(folder: Path, **more: str) -> Iterator[tuple["subprocess.Popen[bytes]", Callable[[], str]]]:
    """Run `fhir-assets dev` during the block. Yield its process and a function that returns what it has printed."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("DAGSTER_HOME", "DAGSTER_POSTGRES_URL", "DB_URL")
    }
    environment |= {"FHIR_ASSETS_HOME": str(folder / "home"), "FHIR_RESOURCE_TYPES": "Patient", "API_TOKENS": TOKENS}
    command = [sys.executable, "-c", "from fhir_assets.cli import main; main()", "dev"]
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


@pytest.mark.slow
def test_each_process_of_dev_comes_back_after_sigkill(tmp_path: Path) -> None:
    with running_dev(tmp_path) as (process, text):
        url = find_url(text)
        wait_until(lambda: is_up(url), text())
        dev = psutil.Process(process.pid)
        for name, pattern in PARTS.items():
            wait_until(partial(find, dev, tmp_path / "home", pattern), f"{name}: {text()}")
            victim = find(dev, tmp_path / "home", pattern)
            assert victim is not None, name
            told = text().count("restarting it")
            victim.kill()
            wait_until(partial(says_more_often, text, "restarting it", told), f"{name}: {text()}")
            wait_until(lambda: is_up(url), f"{name}: {text()}")
            assert process.poll() is None, name


@pytest.mark.slow
def test_dev_goes_on_after_an_outage_of_postgres(tmp_path: Path, postgres: str, database: str) -> None:
    dagster_url = normalise_url(database, "psycopg2")
    with running_dev(tmp_path, DB_URL=database, DAGSTER_POSTGRES_URL=dagster_url) as (process, text):
        url = find_url(text)
        wait_until(lambda: is_up(url), text())
        with database_unavailable(postgres, database):
            time.sleep(10)
        with connect(database) as conn:
            (ended,) = conn.execute("SELECT now()").fetchone() or (None,)
        wait_until(lambda: is_up(url), text())
        wait_until(partial(has_ticked, database, ended), text())
        assert process.poll() is None


def has_ticked(database: str, since: datetime) -> bool:
    """Return whether the daemon has evaluated a sensor since then."""
    with connect(database) as conn:
        row = conn.execute("SELECT max(update_timestamp) FROM job_ticks").fetchone()
    return bool(row and row[0] and row[0].replace(tzinfo=UTC) > since)
