"""What the benchmarks run on: its size, a throw-away Postgres, and a process's peak memory."""

import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets.warehouse.postgres.db.connections import connect

SYNTHEA = Path(__file__).resolve().parents[2] / "shared" / "data" / "synthea"
"""The shared Synthea population, 8,421 resources; absent outside the project's own workshop."""


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a whole deployment, its embedded Postgres too; stopped and removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="fhir_assets_benchmark_"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        if (folder / "postgres").exists():
            embedded.stop(folder)
        shutil.rmtree(folder, ignore_errors=True)


def peak_mib() -> float:
    """The peak resident memory of this process so far, in MiB.

    Linux's own ``ru_maxrss`` would carry over that of the process which started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def processor_seconds(home: Path) -> float:
    """Seconds that processors worked: for this process, those it started, and the Postgres of a home."""
    found = [psutil.Process()]
    with suppress(OSError, psutil.Error):
        found.append(psutil.Process(int((home / "postgres" / "postmaster.pid").read_text().split()[0])))
    seconds = 0.0
    for process in found:
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                times = each.cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def size() -> str:
    """Cores, memory, Python, Postgres and how busy the machine is, on one line."""
    with scratch() as home, connect(embedded.ensure(home)) as conn:
        server = conn.info.parameter_status("server_version") or "?"
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, Postgres {server.split()[0]} (embedded), load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    print(size())
