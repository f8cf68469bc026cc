"""Run every benchmark: ``python -m benchmarks``. It takes some minutes; each benchmark is also a module of its own."""

import subprocess
import sys

PARTS = (
    ("machine", "The machine"),
    ("definitions", "Loading the definitions, each time in a process of its own"),
    ("commands", "Commands: CPU time, as multiples of `import dagster`"),
    ("end_to_end", "NDJSON to loaded tables through a Dagster run, compared with dlt"),
    ("cold_loads", "18,000 resources by processes that start cold, compared with dlt"),
    ("cold_loads 180000 --rounds 1", "180,000 resources by processes that start cold, compared with dlt"),
    ("scale", "Cost of a million resources by layer: time, CPU, memory and bytes"),
    ("workers", "Worker processes: two compared with one"),
    ("windows", "A load of a thousand nearly empty windows, and of an empty window"),
    ("backfill", "A backfill of a thousand nearly empty windows through Dagster's daemon"),
    ("memory", "Peak memory of one window"),
    ("validation", "Validation, compared with fhir.resources"),
    ("views", "Views, compared with sqlonfhir"),
    ("loader", "The loader without Dagster"),
    ("dead_letters", "Dead letters: listing among a million, replay"),
    ("privacy", "Encryption and consent, compared with a plain load"),
    ("exports", "Exports: peak memory"),
    ("bulk", "Bulk export: speed, peak memory, small files"),
    ("rotation", "Key rotation: speed, peak memory"),
    ("upgrade", "The upgrade of a loaded database, beside readers and a load"),
    ("upload", "Upload to a FHIR server"),
    ("api", "The HTTP API: intake, and searches among a million encrypted patients"),
    ("posts", "Posts: seconds until the tables show them, idle and during a first load"),
    ("posts --celery", "Posts, with a first load by a Celery worker"),
    ("generator", "The sandbox: generating and serving"),
)


def main() -> int:
    """Print the table of every benchmark. Return 1 if one failed or exceeded its limit."""
    failed = []
    for name, title in PARTS:
        print(f"\n## {title}\n", flush=True)
        # One process per benchmark, so that none starts with the memory and the caches of another.
        if subprocess.run([sys.executable, "-m", *f"benchmarks.{name}".split()]).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
