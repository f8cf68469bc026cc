"""Measure how long Dagster takes to load the project's definitions: ``python -m benchmarks.definitions``.

Each round is a new process, which measures the time from before the first import to the resolved job.
"""

import json
import subprocess
import sys

ROUNDS = 3
LIMIT_SECONDS = 3.0
_HEAVY = ("fhir.resources", "pyarrow", "fastapi", "moto", "boto3")

_MEASURE = """
import json, sys, time
started = time.perf_counter()
import dagster
dagster_seconds = time.perf_counter() - started
from fhir_assets.definitions import build_definitions
from fhir_assets.settings import load_settings
imported = time.perf_counter() - started
build_definitions(load_settings(fhir_base_url="/", fhir_source="ndjson")).resolve_job_def("incremental_load")
unnecessary = sorted(set(sys.argv[1:]) & set(sys.modules))
print(json.dumps([dagster_seconds, imported, time.perf_counter() - started, unnecessary]))
"""


def main() -> None:
    """Print the table. Exit with 1 if the best round exceeds the limit."""
    rounds = [json.loads(subprocess.check_output([sys.executable, "-c", _MEASURE, *_HEAVY])) for _ in range(ROUNDS)]
    dagster, imported, total, heavy = min(rounds, key=lambda figures: figures[2])
    print(f"{'Dagster imported':<44}{dagster:>8.2f} s")
    print(f"{'other modules imported':<44}{imported - dagster:>8.2f} s")
    print(f"{'definitions built, with all views':<44}{total - imported:>8.2f} s")
    print(f"{'total, best of ' + str(ROUNDS):<44}{total:>8.2f} s (limit {LIMIT_SECONDS:.0f} s)")
    print(f"{'unnecessary imports':<44}{', '.join(heavy) or 'none':>10}")
    if total >= LIMIT_SECONDS:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
