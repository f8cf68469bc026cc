"""Measure a load from NDJSON to tables through a Dagster run, compared with ``dlt`` on the same files and Postgres.

``python -m benchmarks.end_to_end [resources]``. fhir_assets reads, stores the raw bytes, validates with all rules,
fills the tables of all views, stores the JSON and reconciles; dlt flattens (nesting 2) and merges. Then Postgres' COPY
alone stores the rows that our load has stored: the share of its speed that the load reaches. Fewer resources than the
default are measured, but not judged.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import population
from benchmarks.copy_alone import CopyAlone
from benchmarks.deployment import Load, load
from benchmarks.figures import Figure, report
from benchmarks.machine import scratch
from benchmarks.meter import Meter
from benchmarks.processes import Spent, run
from fhir_assets.warehouse.postgres.db import embedded

RESOURCES = 280_000
GOAL_RATIO = 6.0
"""The least ratio of dlt's seconds to ours."""
GOAL_SHARE = 0.3
"""The least share of the speed of COPY alone."""
GOAL_WALL = 1.15
"""The most seconds, as a multiple of our CPU seconds and Postgres' divided by the cores."""


def main(resources: int = RESOURCES) -> int:
    """Print the table. Return 1 if a goal is missed."""
    with scratch() as home:
        source = home / "input"
        source.mkdir()
        written = population.write(source, resources)
        size = sum(path.stat().st_size for path in source.iterdir()) / 2**20
        print(f"{written:,} resources of {len(list(source.glob('*.ndjson.gz')))} types, {size:.0f} MiB of .ndjson.gz")
        done, ours = _load(home, source)
        for part, seconds in done.parts.items():
            microseconds = seconds / done.resources * 1e6
            print(f"  {part:<28}{seconds:>8.1f} s {microseconds:>8.0f} us per resource {seconds / done.seconds:>6.0%}")
        print(f"{'fhir_assets':<30}{done.rate:>8,.0f} resources/s  {ours}", flush=True)
        copy = CopyAlone(home, home / "rows")
        plain = copy.measure()
        for title, copied in (("COPY alone", plain), ("COPY alone, with indexes", copy.measure(indexes=True))):
            speed = copied.size / 2**20 / copied.spent.seconds
            print(f"{title:<30}{speed:>8,.0f} MiB/s, {copied.rows:,} rows  {copied.spent}", flush=True)
        peer = _load_peer(home, source)
        print(f"{'dlt, no validation':<30}{written / peer.seconds:>8,.0f} resources/s  {peer}")
    wall = ours.seconds / (ours.processor / (os.cpu_count() or 1))
    title = f"{written:,} resources in one warm run"
    many = written >= RESOURCES
    share = plain.spent.seconds / ours.seconds
    return report(
        Figure(
            3,
            title,
            peer.seconds / ours.seconds,
            GOAL_RATIO if many else None,
            " times dlt",
            True,
            ours,
            peer,
            "dlt, no validation",
        ),
        Figure(
            3,
            f"{title}, the same rows",
            share,
            GOAL_SHARE if many else None,
            " of COPY",
            True,
            ours,
            plain.spent,
            "COPY alone",
        ),
        Figure(4, f"{title}, wall", wall, GOAL_WALL if many else None, " times CPU / cores", ours=ours),
    )


def _load(home: Path, source: Path) -> tuple[Load, Spent]:
    """Load in this process. Return the load and what it spent."""
    embedded.ensure(home)
    meter = Meter(home)
    with meter.record_peaks():
        done = load(home, source)
    peak = (meter.peak_own + meter.peak_workers) / 2**20
    return done, Spent(done.seconds, done.processor - done.postgres, done.postgres, peak)


def _load_peer(home: Path, source: Path) -> Spent:
    """Load by dlt in a process of its own. The seconds are those of the load, after the imports."""
    output, spent = run([sys.executable, "-m", "benchmarks.peer", str(source), str(home)], home=home)
    return replace(spent, seconds=float(output.split()[-1]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("resources", type=int, nargs="?", default=RESOURCES)
    sys.exit(main(parser.parse_args().resources))
