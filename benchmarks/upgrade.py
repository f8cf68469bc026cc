"""Measure the upgrade of a loaded database to views with more columns and tables: ``python -m benchmarks.upgrade [N]``.

An older version, whose views lack every third column and the tables of codings, loads half of N synthetic resources of
all types (default 200,000, for an upgrade of 100,000). Then `fhir-assets migrate` of this version fills what is new
from ``fhir.resource``, while a reader counts whole tables and `fhir-assets ingest` loads the other half. The rows are
compared with those of a fresh load. Nothing is changed outside a temporary folder.
"""

import sys

from benchmarks.machine import describe, scratch
from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets.warehouse.postgres.db.connections import ensure_database, with_database
from fhir_assets_tests.support.older_version import Upgrade, upgrade

RESOURCES = 200_000


def main(resources: int = RESOURCES) -> None:
    """Print the table. Exit with 1 if rows differ, or if a reader saw fewer rows than before."""
    print(describe())
    with scratch() as home:
        url = embedded.ensure(home)
        for name in ("upgraded", "fresh"):
            ensure_database(url, name)
        work = home / "upgrade"
        work.mkdir()
        done = upgrade(with_database(url, "upgraded"), with_database(url, "fresh"), work, resources)
    print_table(done)
    if done.differing or done.lost_rows:
        raise SystemExit(1)


def print_table(done: Upgrade) -> None:
    """Print what was measured, one line for each figure."""
    print(f"loaded by the older version   {done.resources:>10,} resources {done.load_seconds:>8.1f} s")
    rate = done.resources / done.seconds
    print(f"upgraded                      {done.resources:>10,} resources {done.seconds:>8.1f} s {rate:>8,.0f}/s")
    print(f"loaded meanwhile              {done.loaded_meanwhile:>10,} resources")
    print(f"reads meanwhile               {done.reads:>10,}           {done.slowest_read:>8.2f} s the slowest")
    print(f"lines of progress             {len(done.progress):>10,}           the last: {done.progress[-1]}")
    print(f"tables with other rows than a fresh load: {', '.join(done.differing) or f'none of {done.tables}'}")
    print(f"tables in which a reader saw fewer rows: {', '.join(done.lost_rows) or 'none'}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else RESOURCES)
