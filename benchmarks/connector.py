"""Measure the connector: the latency of a steady stream of changes, and the speed of draining a backlog.

``python -m benchmarks.connector [backlog] [seconds]`` prints a table. Postgres, the connector, the sandbox server and
the writer are processes of this machine and share its cores.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import requests

from fhir_assets.delivery.connector import outbox
from fhir_assets.sandbox.process import SandboxProcess
from fhir_assets.warehouse.postgres.db import embedded, migrations
from fhir_assets.warehouse.postgres.db.connections import Connection, connect

SYSTEM = "urn:benchmark"
RATE = 100
WORKERS = 4


def main(backlog: int, seconds: int) -> None:
    """Print the table."""
    home = Path(tempfile.mkdtemp(prefix="fhir_assets_benchmark_"))
    home.chmod(0o711)
    try:
        url = embedded.ensure(home)
        with connect(url, autocommit=True) as conn, SandboxProcess() as server:
            migrations.upgrade(url)
            outbox.install(conn)
            print(f"{WORKERS} workers")
            with _run_connector(url, server.url, home):
                _measure_latency(conn, server.url, seconds)
            _measure_backlog(conn, url, server.url, home, backlog)
    finally:
        embedded.stop(home)
        shutil.rmtree(home, ignore_errors=True)


def _measure_latency(conn: Connection, server: str, seconds: int) -> None:
    """Measure changes at a steady rate from their commit, by the writer's clock, to the server's ``lastUpdated``."""
    _insert_patients(conn, "warm", 20)
    _wait_until_delivered(conn)
    committed: dict[str, float] = {}
    started = time.time()
    for n in range(RATE * seconds):
        time.sleep(max(0.0, started + n / RATE - time.time()))
        conn.execute(
            "INSERT INTO health.patient (identifier_system, identifier_value, name_family) VALUES (%s, %s, 'B')",
            [SYSTEM, f"steady-{n}"],
        )
        committed[f"steady-{n}"] = time.time()
    _wait_until_delivered(conn)
    latencies = []
    for resource in _read_patients(server):
        value = resource["identifier"][0]["value"]
        if value in committed:
            updated = datetime.fromisoformat(resource["meta"]["lastUpdated"]).timestamp()
            latencies.append(1000 * max(0.0, updated - committed[value]))
    assert len(latencies) == len(committed)
    latencies.sort()
    p50, p99 = latencies[len(latencies) // 2], latencies[len(latencies) * 99 // 100]
    print(f"{RATE} changes/s for {seconds} s: commit to accepted PUT p50 {p50:.0f} ms, p99 {p99:.0f} ms")


def _measure_backlog(conn: Connection, url: str, server: str, home: Path, backlog: int) -> None:
    """Measure a backlog of new patients that exists before the connector starts: one event and one PUT per patient."""
    _insert_patients(conn, "backlog", backlog)
    with _run_connector(url, server, home) as process:
        while outbox.read_status(conn).unprocessed == backlog:
            time.sleep(0.01)
        began, first = time.perf_counter(), outbox.read_status(conn).unprocessed
        sizes: list[int] = []
        while outbox.read_status(conn).unprocessed:
            sizes.append(process.memory_info().rss >> 20)
            time.sleep(0.25)
        elapsed = time.perf_counter() - began
    third = len(sizes) // 3 or 1
    print(
        f"backlog of {backlog:,}: {first / elapsed:,.0f} events/s;"
        f" memory {max(sizes[:third])} MB in the first third,"
        f" {max(sizes[-third:])} MB in the last"
    )


def _insert_patients(conn: Connection, name: str, count: int) -> None:
    conn.execute(
        "INSERT INTO health.patient (identifier_system, identifier_value, name_family, name_given, gender, birth_date)"
        " SELECT %s, %s || n, 'B', 'x', 'female', '1970-01-01' FROM generate_series(1, %s) n",
        [SYSTEM, f"{name}-", count],
    )


def _wait_until_delivered(conn: Connection) -> None:
    while outbox.read_status(conn).unprocessed:
        time.sleep(0.05)


def _read_patients(server: str) -> Iterator[dict[str, Any]]:
    page: str | None = f"{server}/Patient?_count=1000"
    while page:
        bundle = requests.get(page, timeout=60).json()
        yield from (entry["resource"] for entry in bundle["entry"])
        page = next((link["url"] for link in bundle["link"] if link["relation"] == "next"), None)


@contextmanager
def _run_connector(url: str, server: str, home: Path) -> Iterator[psutil.Process]:
    command = [sys.executable, "-c", "from fhir_assets.cli.connector import app; app()", "run", f"--workers={WORKERS}"]
    environment = {**os.environ, "DB_URL": url, "FHIR_BASE_URL": server, "METRICS_PORT": "0"}
    with subprocess.Popen(command, env=environment, cwd=home, stderr=subprocess.DEVNULL) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    main(arguments[0] if arguments else 10_000, arguments[1] if arguments[1:] else 20)
