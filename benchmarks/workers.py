"""What worker processes do for a load, apart from Postgres: validation and view evaluation, by one and by several.

``python -m benchmarks.workers [resources] [processes]``

Batches as a load has them go through ``pipeline.workers`` and come back in order, ready for COPY; nothing is written.
One process means none besides this one. The rounds take turns; the figures are the best. Goal: two are 1.6 times one.
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
    """Print both figures of both jobs, and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        count = population.write(Path(folder), resources)
        batches = {
            path.name.partition(".")[0]: list(_batches(gzip.decompress(path.read_bytes()).splitlines()))
            for path in sorted(Path(folder).glob("*.ndjson.gz"))
        }
    pools = {1: WorkerPool(1), processes: WorkerPool(processes)}
    best = {(job, number): float("inf") for number in pools for job in ("validation", "views")}
    for _ in range(ROUNDS):
        for number, workers in pools.items():
            for job, seconds in _round(workers, batches).items():
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
def _round(workers: WorkerPool, batches: dict[str, list[list[bytes]]]) -> dict[str, float]:
    """Seconds of each job over all types."""
    settings = load_settings()
    validator, views = Validator(), build_views(settings).views
    started = perf_counter()
    for lines in batches.values():
        judged = workers.map(
            LineValidator(validator),
            ((None, each) for each in lines),
            weigh=lambda each: sum(map(len, each)),
            seconds=60,
        )
        for _ in judged:
            pass
    between = perf_counter()
    for name, lines in batches.items():
        made = workers.map(
            RowBuilder([view for view in views if view.resource_type == name], NO_ENCRYPTION),
            ((None, Batch(each, "2024-01", _ARRIVED)) for each in lines),
            weigh=lambda batch: batch.size,
            seconds=60,
        )
        for _, batch, rows in made:
            assert len(rows.block) + len(rows.rejected) == len(batch.lines)
    return {"validation": between - started, "views": perf_counter() - between}


def _batches(lines: list[bytes]) -> Iterator[list[bytes]]:
    held: list[bytes] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= BATCH_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("resources", type=int, nargs="?", default=RESOURCES)
    parser.add_argument("processes", type=int, nargs="?", default=2)
    arguments = parser.parse_args()
    main(arguments.resources, arguments.processes)
