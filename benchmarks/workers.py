"""Measure the work of worker processes without Postgres: validation and view evaluation, by one and by several.

``python -m benchmarks.workers [resources] [processes]``

The workers get batches of the size of a load and return them in order, ready for COPY; no row is written. One process
means this process without workers. The rounds alternate; the figures are the best. Goal: two processes have 1.6 times
the speed of one.
"""

import argparse
import gzip
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

from benchmarks import population
from fhir_assets.deployment.views import build_views
from fhir_assets.fhir.validation import Validator
from fhir_assets.pipeline.load.row_builder import Batch, RowBuilder
from fhir_assets.pipeline.validate.step import LineValidator
from fhir_assets.pipeline.workers.gc_tuning import infrequent_gc
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.settings import load_settings
from fhir_assets.storage.store import BATCH_BYTES

RESOURCES = 200_000
ROUNDS = 3
_ARRIVED = datetime(2024, 1, 1, tzinfo=UTC)


def main(resources: int, processes: int) -> None:
    """Print the figures of validation and of views, and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        count = population.write(Path(folder), resources)
        batches = {
            path.name.partition(".")[0]: list(_split_batches(gzip.decompress(path.read_bytes()).splitlines()))
            for path in sorted(Path(folder).glob("*.ndjson.gz"))
        }
    pools = {1: WorkerPool(1), processes: WorkerPool(processes)}
    best = {(job, number): float("inf") for number in pools for job in ("validation", "views")}
    for _ in range(ROUNDS):
        for number, workers in pools.items():
            for job, seconds in _measure_round(workers, batches).items():
                best[job, number] = min(best[job, number], seconds)
    for workers in pools.values():
        workers.close()
    print(f"{count:,} resources{'one process':>22}{f'{processes} processes':>16}{'ratio':>8}")
    for job in ("validation", "views"):
        one, several = best[job, 1], best[job, processes]
        print(f"  {job:<18}{count / one:>12,.0f}/s{count / several:>14,.0f}/s{one / several:>8.2f}")
    one, several = (best["validation", number] + best["views", number] for number in (1, processes))
    print(f"  {'both':<18}{count / one:>12,.0f}/s{count / several:>14,.0f}/s{one / several:>8.2f}")


@infrequent_gc()
def _measure_round(workers: WorkerPool, batches: dict[str, list[list[bytes]]]) -> dict[str, float]:
    """Return the seconds of each job over all types."""
    settings = load_settings()
    validator, views = Validator(), build_views(settings).views
    started = perf_counter()
    for lines in batches.values():
        validated = workers.map(
            LineValidator(validator),
            ((None, batch) for batch in lines),
            weigh=lambda batch: sum(map(len, batch)),
            seconds=60,
        )
        for _ in validated:
            pass
    validation_ended = perf_counter()
    for name, lines in batches.items():
        built = workers.map(
            RowBuilder([view for view in views if view.resource_type == name], NO_ENCRYPTION, "default"),
            ((None, Batch(batch_lines, "2024-01", _ARRIVED)) for batch_lines in lines),
            weigh=lambda batch: batch.size,
            seconds=60,
        )
        for _, batch, rows in built:
            assert len(rows.block) + len(rows.rejected) == len(batch.lines)
    return {"validation": validation_ended - started, "views": perf_counter() - validation_ended}


def _split_batches(lines: list[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("resources", type=int, nargs="?", default=RESOURCES)
    parser.add_argument("processes", type=int, nargs="?", default=2)
    arguments = parser.parse_args()
    main(arguments.resources, arguments.processes)
