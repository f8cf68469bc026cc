"""Measure ``fhir-assets upload``: its speed and its memory, which must not grow with the input.

``python -m benchmarks.upload [patients]`` prints a table. The input is a synthetic population of that many patients
and, if present, Synthea. The command and the sandbox server are processes of their own.
"""

import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import psutil

from benchmarks.machine import SYNTHEA
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxProcess

LIMIT = 3_000
"""The minimum speed, in resources per second."""


def main(patients: int) -> int:
    """Print a line per input. Return 1 if the upload of the large population was slower than LIMIT."""
    with TemporaryDirectory() as folder:
        few, many = Path(folder, "few"), Path(folder, "many")
        write_population(few, Population(max(1, patients // 4), 1))
        write_population(many, Population(patients, 1))
        inputs = {f"{max(1, patients // 4)} synthetic patients": few, f"{patients} synthetic patients": many}
        if SYNTHEA.exists():
            inputs["Synthea"] = SYNTHEA
        rates = [_measure(name, path, Path(folder)) for name, path in inputs.items()]
    return int(rates[1] < LIMIT)


def _measure(name: str, source: Path, home: Path) -> float:
    with SandboxProcess() as server:
        command = [sys.executable, "-c", "from fhir_assets.cli import main; main()", "upload", "--json"]
        started = time.perf_counter()
        with subprocess.Popen(
            [*command, "--input", str(source), "--url", server.url], cwd=home, stdout=subprocess.PIPE
        ) as process:
            command_process, server_process = psutil.Process(process.pid), psutil.Process(server.pid)
            peak = [0]
            watching = threading.Thread(target=_record_peak, args=(command_process, peak), daemon=True)
            watching.start()
            assert process.stdout is not None
            summary: dict[str, Any] = orjson.loads(process.stdout.read())
            server_times = server_process.cpu_times()
    server_seconds = server_times.user + server_times.system
    count, seconds = sum(summary["totals"].values()), summary["seconds"]
    print(
        f"{name}: {count:,} resources in {seconds:.1f} s, {count / seconds:,.0f}/s (with the start of the command"
        f" {count / (time.perf_counter() - started):,.0f}/s); server {1e6 * server_seconds / count:.0f} µs"
        f" of CPU per resource; peak memory {peak[0] >> 20} MiB; {summary['totals']['failed']} failed"
    )
    return float(count / seconds)


def _record_peak(process: psutil.Process, peak: list[int]) -> None:
    try:
        while True:
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        return


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 200))
