"""A deployment to measure: embedded Postgres, migrated, Dagster's storage in it as in ``fhir-assets ingest``."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import dagster as dg

from benchmarks.machine import processor_seconds
from fhir_assets.definitions import build_definitions
from fhir_assets.ingestion import Ingestion, Listener, select_failed
from fhir_assets.orchestration.instance import config
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.settings import SourceKind, load_settings
from fhir_assets.warehouse.postgres.db import embedded, migrations
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.windows import Granularity


@dataclass(frozen=True, slots=True)
class Load:
    """One load: resources that are in the tables at its end, seconds in all, of processors, and by part."""

    resources: int
    seconds: float
    processor: float
    parts: Mapping[str, float]

    @property
    def rate(self) -> float:
        """Resources a second."""
        return self.resources / self.seconds


@contextmanager
def deployed(home: Path, **settings: object) -> Iterator[tuple[Ingestion, dg.DagsterInstance]]:
    """A fresh deployment in ``home``, ready to load; its database is the embedded one there."""
    for name in ("DAGSTER_HOME", "DAGSTER_POSTGRES_URL"):
        os.environ.pop(name, None)
    chosen = load_settings(fhir_assets_home=home, db_url=None, **settings)
    migrations.upgrade(embedded.ensure(chosen.home))
    instance = config.open_instance(chosen)
    ingestion = Ingestion(chosen, build_definitions(chosen), instance)
    ingestion.count_steps()
    try:
        yield ingestion, instance
    finally:
        instance.dispose()


def load(home: Path, source: Path, *, listener: Listener | None = None, **settings: object) -> Load:
    """Everything in ``source`` through Dagster runs of ``incremental_load``, in this process. ``listener`` hears."""
    of_files = {"fhir_base_url": str(source), "fhir_source": SourceKind.NDJSON, "fhir_partition": Granularity.MONTHLY}
    with deployed(home, **of_files, **settings) as (ingestion, instance):
        parts: defaultdict[str, float] = defaultdict(float)
        before = processor_seconds(home)
        started = perf_counter()
        due = ingestion.find_due()
        ingestion.begin_checkpoints(due)
        parts["what is due"] = perf_counter() - started
        outcomes = [
            ingestion.load(windows, refresh=Refresh.MISSING, triggered_by="benchmark", listener=listener)
            for windows in due
        ]
        seconds = perf_counter() - started
        processor = processor_seconds(home) - before
        if select_failed(outcomes):
            raise SystemExit("the load failed: the figures would say nothing")
        for outcome in outcomes:
            for step in instance.get_run_step_stats(outcome.run_id):
                if step.start_time and step.end_time:
                    parts[step.step_key.split("__")[0]] += step.end_time - step.start_time
        parts["Dagster between the steps"] = seconds - sum(parts.values())
        with connect(embedded.ensure(home)) as conn:
            (count,) = conn.execute("SELECT count(*) FROM fhir.resource").fetchone() or (0,)
        return Load(count, seconds, processor, parts)
