"""Measure a load from NDJSON to tables through a Dagster run, compared with ``dlt`` on the same files and Postgres.

``python -m benchmarks.end_to_end [resources]``. fhir_assets reads, stores the raw bytes, validates with all rules,
fills the tables of all views, stores the JSON and reconciles; dlt flattens (nesting 2) and merges.
"""

import argparse
import gc
from time import perf_counter

from benchmarks import peer, population
from benchmarks.deployment import load
from benchmarks.machine import scratch

RESOURCES = 100_000


def main(resources: int = RESOURCES) -> None:
    """Print the table."""
    with scratch() as home:
        source = home / "input"
        source.mkdir()
        written = population.write(source, resources)
        size = sum(path.stat().st_size for path in source.iterdir()) / 2**20
        print(f"{written:,} resources of {len(list(source.glob('*.ndjson.gz')))} types, {size:.0f} MiB of .ndjson.gz")
        ours = load(home, source)
        for part, seconds in ours.parts.items():
            microseconds = seconds / ours.resources * 1e6
            print(f"  {part:<28}{seconds:>8.1f} s {microseconds:>8.0f} us per resource {seconds / ours.seconds:>6.0%}")
        print(f"{'fhir_assets':<30}{ours.seconds:>8.1f} s {ours.rate:>8,.0f} resources/s")
        gc.collect()
        gc.freeze()
        started = perf_counter()
        peer.load(home, source)
        seconds = perf_counter() - started
        print(f"{'dlt, no validation':<30}{seconds:>8.1f} s {written / seconds:>8,.0f} resources/s")
        print(f"ratio {ours.rate / (written / seconds):.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("resources", type=int, nargs="?", default=RESOURCES)
    main(parser.parse_args().resources)
