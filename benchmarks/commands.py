"""Measure the CPU time of commands as multiples of ``import dagster``: ``python -m benchmarks.commands``.

Each round runs every command once, so that all share what the machine has at that moment. The least CPU time counts.
"""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.figures import Figure, report
from fhir_assets.sandbox.process import SandboxProcess

ROUNDS = 5
BASE = "import dagster"
GOALS = {
    "--help": 0.4,
    "runs list": 1.1,
    "dead-letters list": 1.1,
    "validate patient.json": 1.0,
    "view run patient_view.json patient.json": 1.0,
    "ingest": 1.8,
}
"""The largest multiple of the CPU time of ``import dagster`` for each command."""

_PROGRAM = "from fhir_assets.cli import main; main()"
_VIEW = (
    '{"name":"p","resource":"Patient","status":"active",'
    '"select":[{"column":[{"name":"id","path":"getResourceKey()"}]}]}'
)


def main() -> int:
    """Print the figures. Return 1 if a command exceeds its goal."""
    with tempfile.TemporaryDirectory() as folder, SandboxProcess() as sandbox:
        home = Path(folder)
        (home / "patient.json").write_text('{"resourceType":"Patient","id":"p1"}')
        (home / "patient_view.json").write_text(_VIEW)
        environment = os.environ | {
            "FHIR_ASSETS_HOME": folder,
            "FHIR_BASE_URL": sandbox.url,
            "FHIR_RESOURCE_TYPES": "Patient,Observation",
            "PYTHONPATH": str(Path.cwd()),
        }
        _run([sys.executable, "-c", _PROGRAM, "ingest"], home, environment)
        best = dict.fromkeys([BASE, *GOALS], float("inf"))
        for _ in range(ROUNDS):
            for name in best:
                words = ["-c", BASE] if name == BASE else ["-c", _PROGRAM, *name.split()]
                best[name] = min(best[name], _run([sys.executable, *words], home, environment))
    print(f"{BASE:<44}{best[BASE]:>8.2f} s")
    return report(
        *(
            Figure(1, f"`{name}`, {best[name]:.2f} s CPU", best[name] / best[BASE], goal, f" times `{BASE}`")
            for name, goal in GOALS.items()
        )
    )


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Run a command and return its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
