"""Run every benchmark: ``python -m benchmarks``. It takes some minutes; each benchmark is also a module of its own.

At the end it prints one table of all figures that have a goal. ``--goals`` runs only the benchmarks with such figures,
``--large`` also with millions of resources (hours), ``--small`` with a few, to see that they work.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import COLLECTED, collect, render


@dataclass(frozen=True, slots=True)
class Part:
    """A benchmark with its arguments. One with figures of the goals has arguments for few resources, ``small``."""

    command: str
    title: str
    small: str | None = None
    large: bool = False
    """Whether it runs only with ``--large``."""


PARTS = (
    Part("machine", "The machine"),
    Part("definitions", "Loading the definitions, each time in a process of its own"),
    Part("commands", "Commands: CPU time, as multiples of `import dagster`"),
    Part("cold_loads", "18,000 resources by processes that start cold, compared with dlt", "--rounds 1"),
    Part("cold_loads 180000 --rounds 1", "180,000 resources by processes that start cold, compared with dlt"),
    Part("end_to_end", "NDJSON to loaded tables through a Dagster run, compared with dlt and COPY", "10000"),
    Part("scale", "Cost of a million resources by layer: time, CPU, memory and bytes"),
    Part("workers", "Worker processes: two compared with one"),
    Part("windows", "A load of a thousand nearly empty windows, and of an empty window"),
    Part("backfill", "A backfill of a thousand nearly empty windows through Dagster's daemon"),
    Part("memory", "Peak memory of one window"),
    Part("validation", "Validation, compared with fhir.resources"),
    Part("views", "Views, compared with sqlonfhir"),
    Part("loader", "The loader without Dagster"),
    Part("dead_letters", "Dead letters: listing among a million, replay"),
    Part("privacy", "Encryption and consent, compared with a plain load"),
    Part("exports", "Exports: peak memory"),
    Part("bulk", "Bulk export: speed, peak memory, small files"),
    Part("rotation", "Key rotation: speed, peak memory"),
    Part("upgrade", "The upgrade of a loaded database, beside readers and a load"),
    Part("upload", "Upload to a FHIR server"),
    Part("api", "The HTTP API: intake, and searches among a million encrypted patients"),
    Part("posts", "Posts: seconds until the tables show them, idle and during a first load"),
    Part("posts --celery", "Posts, with a first load by a Celery worker"),
    Part("generator", "The sandbox: generating and serving"),
)


def main(*, goals: bool, large: bool, small: bool) -> int:
    """Print the table of every benchmark, and one of the goals. Return 1 if one failed or exceeded its limit."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.jsonl"
        path.touch()
        environment = {**os.environ, COLLECTED: str(path)}
        for part in PARTS:
            if (part.large and not large) or ((goals or small) and part.small is None):
                continue
            command = part.command if not small else f"{part.command.split()[0]} {part.small}"
            print(f"\n## {part.title}\n\n`python -m benchmarks.{command.strip()}`\n", flush=True)
            # One process per benchmark, so that none starts with the memory and the caches of another.
            words = f"benchmarks.{command}".split()
            if subprocess.run([sys.executable, "-m", *words], env=environment).returncode:
                failed.append(command)
        figures = collect(path)
    print(f"\n## The goals\n\n{render(figures)}")
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goals", action="store_true", help="Run only the benchmarks with figures of the goals")
    parser.add_argument("--large", action="store_true", help="Also run the benchmarks of millions of resources")
    parser.add_argument("--small", action="store_true", help="Run the goals' benchmarks with few resources")
    arguments = parser.parse_args()
    sys.exit(main(goals=arguments.goals, large=arguments.large, small=arguments.small))
