"""The machine of the benchmarks: its size, temporary deployments, and the memory and CPU of processes."""

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
"""The shared Synthea population of 8,421 resources. The folder exists only on the project's own machines."""


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a temporary folder for a deployment. At the end its embedded Postgres is stopped and the folder removed."""
    folder = Path(tempfile.mkdtemp(prefix="fhir_assets_benchmark_"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        if (folder / "postgres").exists():
            embedded.stop(folder)
        shutil.rmtree(folder, ignore_errors=True)


def peak_mib() -> float:
    """Return the peak resident memory of this process so far, in MiB.

    On Linux ``ru_maxrss`` would include the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def cpu_seconds(home: Path) -> float:
    """Return the CPU seconds of this process, its children and the Postgres in ``home``."""
    roots = [psutil.Process()]
    with suppress(OSError, psutil.Error):
        roots.append(psutil.Process(int((home / "postgres" / "postmaster.pid").read_text().split()[0])))
    seconds = 0.0
    for root in roots:
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                times = process.cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def describe() -> str:
    """Return one line with the machine's cores, memory and load, and the versions of Python and Postgres."""
    with scratch() as home, connect(embedded.ensure(home)) as conn:
        server = conn.info.parameter_status("server_version") or "?"
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, Postgres {server.split()[0]} (embedded), load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    print(describe())
