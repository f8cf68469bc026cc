"""Every benchmark in turn: ``python -m benchmarks``, some minutes. Each also runs by itself."""

import subprocess
import sys

PARTS = (
    ("machine", "The machine"),
    ("definitions", "Definitions, in processes of their own"),
    ("end_to_end", "NDJSON to loaded tables through a Dagster run, beside dlt"),
    ("scale", "What a million resources cost: seconds, CPU, memory, bytes, by layer"),
    ("workers", "Worker processes: two beside one"),
    ("windows", "A backfill of a thousand nearly empty windows, and an empty window"),
    ("backfill", "The same as a backfill of the UI, through Dagster's daemon"),
    ("memory", "Peak memory of one window"),
    ("validation", "Validation, beside fhir.resources"),
    ("views", "Views, beside sqlonfhir"),
    ("loader", "The loader alone"),
    ("dead_letters", "Dead letters: listed by the million, replayed"),
    ("privacy", "Encryption and consent, beside a plain load"),
    ("exports", "Exports: peak memory"),
    ("bulk", "Bulk export: speed, peak memory, small files"),
    ("rotation", "Keys rotated: speed, peak memory"),
    ("upload", "Upload to a FHIR server"),
    ("api", "The HTTP API: intake, and look-ups among a million encrypted patients"),
    ("generator", "The sandbox: generating and serving"),
)


def main() -> int:
    """Print every part's table; 1 if one of them failed or kept no limit."""
    failed = []
    for name, title in PARTS:
        print(f"\n## {title}\n", flush=True)
        # A process each, so that no part finds the memory and the caches of another.
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
