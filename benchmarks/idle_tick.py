"""Measure a tick of the schedule ``incremental_load`` when the source has added nothing to any type.

``python -m benchmarks.idle_tick`` loads a population by search. Then it evaluates the schedule several times, as
Dagster's daemon does every FHIR_SCHEDULE, in the same process. CPU is that of this process and Postgres.
"""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg

from benchmarks.deployment import deployed
from benchmarks.figures import Figure, report
from benchmarks.machine import scratch
from benchmarks.meter import Meter
from benchmarks.processes import Spent
from fhir_assets.definitions import build_definitions
from fhir_assets.ingestion.outcome import select_failed
from fhir_assets.orchestration.jobs import INCREMENTAL_LOAD
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxProcess
from fhir_assets.settings import SourceKind, load_settings
from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.windows import Granularity

GOAL_SECONDS = 1.0
"""The most CPU seconds of a tick."""
GOAL_EVENTS = 150
"""The most events that a tick writes to Dagster's storage."""

_PATIENTS = 20
_DAYS = 7
_TICKS = 5


def main() -> int:
    """Print the figures. Return 1 if a goal is missed."""
    end = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    start = end - timedelta(days=_DAYS)
    with scratch() as home:
        (home / "data").mkdir()
        write_population(home / "data", Population(_PATIENTS, end=end, start=start))
        with SandboxProcess(home / "data") as server:
            settings = {
                "fhir_base_url": server.url,
                "fhir_source": SourceKind.SEARCH,
                "fhir_partition": Granularity.DAILY,
                "fhir_last_updated_gte": start,
            }
            with deployed(home, **settings) as (ingestion, instance):
                due = ingestion.due_loads.find()
                ingestion.due_loads.begin_checkpoints(due)
                load = [ingestion.load(part, refresh=Refresh.MISSING, triggered_by="benchmark") for part in due]
                if select_failed(load):
                    raise SystemExit("the load failed: there is nothing to measure")
                loaded = load_settings(fhir_assets_home=home, db_url=None, **settings)
                repository = build_definitions(loaded).get_repository_def()
                meter = Meter(home, excluded=server.pid)
                events = [_tick(meter, home, instance, repository) for _ in range(_TICKS)]
                types = len(loaded.fhir_resource_types)
    # The first tick resolves the repository, once for all later ones.
    spent = sorted(list(meter.parts.values())[1:], key=lambda cost: cost.load + cost.postgres)[(_TICKS - 1) // 2]
    ours = Spent(spent.seconds, spent.load, spent.postgres)
    print(f"{_TICKS} ticks of {types} types, events {events}\n  the median of those after the first: {ours}")
    work = f"an idle tick of {types} types"
    return report(
        Figure(2, f"{work}, CPU", ours.processor, GOAL_SECONDS, " s", ours=ours),
        Figure(2, f"{work}, events", max(events), GOAL_EVENTS),
    )


def _tick(meter: Meter, home: Path, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition) -> int:
    """Evaluate the schedule at this moment. Return the number of events that it has written."""
    before = _count_events(home)
    now = datetime.now(UTC)
    with meter.measure_part(now.isoformat()), dg.build_schedule_context(instance, now, repository_def=repository) as it:
        requests = repository.get_schedule_def(INCREMENTAL_LOAD).evaluate_tick(it).run_requests
    if requests:
        raise SystemExit("the tick was not idle, it requested a run: there is nothing to measure")
    return _count_events(home) - before


def _count_events(home: Path) -> int:
    with connect(embedded.ensure(home, embedded.DAGSTER_DATABASE)) as conn:
        (count,) = conn.execute("SELECT count(*) FROM event_logs").fetchone() or (0,)
    return int(count)


if __name__ == "__main__":
    sys.exit(main())
