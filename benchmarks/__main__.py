"""Run every benchmark: ``python -m benchmarks``. It takes an hour; each benchmark is also a module of its own.

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
    """A benchmark with its arguments."""

    command: str
    title: str
    small: str | None = None
    """Arguments for few resources, of a benchmark with figures of the goals."""
    goals: bool = False
    """Whether it has figures of the goals, although it has no arguments for few resources."""
    large: bool = False
    """Whether it runs only with ``--large``."""


PARTS = (
    Part("machine", "The machine"),
    Part("definitions", "Loading the definitions, each time in a process of its own"),
    Part("commands", "Commands: CPU time, as multiples of `import dagster`", ""),
    Part("cold_loads", "18,000 resources by processes that start cold, compared with dlt", "--rounds 1"),
    Part(
        "cold_loads 180000 --rounds 1", "180,000 resources by processes that start cold, compared with dlt", goals=True
    ),
    Part(
        "curve --csv build/curve.csv --svg build/curve.svg",
        "Seconds of cold loads over their resources",
        "--maximum 1000",
    ),
    Part(
        "curve --maximum 4000000 --csv build/curve.csv --svg build/curve.svg",
        "Seconds of cold loads over their resources, to 4,000,000",
        goals=True,
        large=True,
    ),
    Part("end_to_end", "NDJSON to loaded tables through a Dagster run, compared with dlt and COPY", "8000"),
    Part("end_to_end 400000", "The same, of 400,000 resources", goals=True, large=True),
    Part("scale", "Cost of a million resources by layer: time, CPU, memory and bytes"),
    Part("workers", "Worker processes: two compared with one"),
    Part("windows", "A load of a thousand nearly empty windows, and of an empty window"),
    Part("window_cost", "What a window costs: a thousand that are empty", "20"),
    Part("window_cost --resource", "What a window costs: a thousand with one resource each", "20 --resource"),
    Part("idle_tick", "A tick of the schedule when there is nothing new", ""),
    Part("backfill", "A backfill of a thousand nearly empty windows through Dagster's daemon"),
    Part("memory", "Peak memory of one window", "20000"),
    Part("validation", "Validation, compared with fhir.resources"),
    Part("views", "Views, compared with sqlonfhir"),
    Part("view_exports", "Views from NDJSON to Parquet, compared with DuckDB", "10000"),
    Part("view_exports 2000000", "The same, of 2,000,000 resources", goals=True, large=True),
    Part("loader", "The loader without Dagster"),
    Part("dead_letters", "Dead letters: listing among a million, replay", "5000 5000"),
    Part("deep_reconcile", "A deep comparison of the tables with the source", "20000"),
    Part("search_fetch", "A fetch by search from a server that answers after 50 ms", "4000"),
    Part("privacy", "Encryption and consent, compared with a plain load"),
    Part("exports", "Exports: peak memory, and speed compared with DuckDB", "20000"),
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
            if small:
                if part.small is None:
                    continue
            elif (part.large and not large) or (goals and part.small is None and not part.goals):
                continue
            command = f"{part.command.split()[0]} {part.small}".strip() if small else part.command
            print(f"\n## {part.title}\n\n`python -m benchmarks.{command}`\n", flush=True)
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
