"""Measure what each layer costs for a million resources.

``make scale``, or ``python -m benchmarks.scale [resources]``, prints the measured table of ``docs/scale.md``: a load
with one worker process and one with two, and the lake, each on an embedded Postgres of its own.
"""

import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import population
from benchmarks.deployment import Load, load
from benchmarks.machine import scratch
from benchmarks.meter import Cost, Meter
from fhir_assets.deployment.store import build_blobs
from fhir_assets.deployment.views import build_views
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.lake import writer
from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets.warehouse.postgres.db.connections import connect

RESOURCES = 100_000
COUNTS = (1, 2)

_TABLE_SIZES = """
SELECT CASE WHEN n.nspname = 'ops' THEN 'ops' WHEN n.nspname = 'fhir_partitions' THEN 'fhir.resource, indexes included'
       ELSE 'tables of the views' END,
       sum(CASE WHEN n.nspname IN ('ops', 'fhir_partitions') THEN pg_total_relation_size(c.oid)
           ELSE pg_table_size(c.oid) END)::bigint,
       sum(pg_indexes_size(c.oid))::bigint
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname IN ('fhir', 'fhir_partitions', 'ops') AND c.relkind = 'r' GROUP BY 1 ORDER BY 1
"""


def main(resources: int = RESOURCES) -> None:
    """Print the table."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, "
        f"load {os.getloadavg()[0]:.1f} at the start"
    )
    columns, rates = [], []
    for count in COUNTS:
        with scratch() as home:
            done, column = _measure(home, resources, count)
            columns.append(column)
            rates.append(done.rate)
    print(f"{done.resources:,} resources; two workers : one = {rates[1] / rates[0]:.2f}\n")
    print("| a million resources | " + " | ".join(f"`FHIR_WORKERS={count}`" for count in COUNTS) + " |")
    print("|---|" + "---|" * len(COUNTS))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column.get(name, "") for column in columns) + " |")


def _measure(home: Path, resources: int, workers: int) -> tuple[Load, dict[str, str]]:
    source = home / "input"
    source.mkdir()
    population.write(source, resources)
    embedded.ensure(home)
    meter = Meter(home)
    with meter.record_peaks():
        done = load(home, source, listener=meter.listen, fhir_workers=workers)
    settings = load_settings(fhir_assets_home=home, db_url=None)
    with meter.measure_part("lake"), connect(embedded.ensure(home), cipher=NO_ENCRYPTION) as conn:
        for view in build_views(settings).views:
            writer.update(conn, build_blobs(settings, str(home / "lake")), view, [], run_id="scale", actor="benchmark")
    million = 1_000_000 / done.resources
    column = {name: _format_cost(meter.parts[name], million) for name in ("raw", "validated", "normalized")}
    column["between the steps (Dagster, planning)"] = f"{done.parts['Dagster between the steps'] * million:,.0f} s"
    column["lake"] = _format_cost(meter.parts["lake"], million)
    column["memory of the run; of all its workers"] = (
        f"{meter.peak_own / 2**20:,.0f} MiB; {meter.peak_workers / 2**20:,.0f} MiB"
    )
    column |= {name: f"{size * million / 2**20:,.0f} MiB" for name, size in _measure_sizes(home).items()}
    column["… and Dagster's storage, a type and window"] = f"{_dagster_bytes(home) / 2**10:,.1f} KiB"
    return done, column


def _format_cost(cost: Cost, million: float) -> str:
    seconds, own, postgres = (value * million for value in (cost.seconds, cost.load, cost.postgres))
    return f"{seconds:,.0f} s; CPU {own:,.0f} s, in Postgres {postgres:,.0f} s"


def _measure_sizes(home: Path) -> Mapping[str, int]:
    sizes = {}
    for name in ("store/raw", "store/validated", "lake"):
        sizes[f"files: {name}"] = sum(path.stat().st_size for path in (home / name).rglob("*") if path.is_file())
    with connect(embedded.ensure(home)) as conn:
        for group, size, indexes in conn.execute(_TABLE_SIZES):
            sizes[f"Postgres: {group}"] = size
            if group == "tables of the views":
                sizes["Postgres: indexes of the views"] = indexes
    return sizes


def _dagster_bytes(home: Path) -> float:
    """Return the bytes of Dagster's storage per type and window. They grow with windows, not with resources."""
    with connect(embedded.ensure(home)) as conn:
        (count,) = conn.execute("SELECT count(*) FROM ops.ingestion_runs").fetchone() or (1,)
    with connect(embedded.ensure(home, embedded.DAGSTER_DATABASE)) as conn:
        (size,) = conn.execute(
            "SELECT sum(pg_total_relation_size(oid)) FROM pg_class"
            " WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
        ).fetchone() or (0,)
    return float(size) / int(count)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else RESOURCES)
