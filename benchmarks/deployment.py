"""A deployment to measure: an embedded, migrated Postgres with Dagster's storage, as ``fhir-assets ingest`` uses it."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from time import perf_counter

import dagster as dg
import yaml

from benchmarks.machine import cpu_seconds
from benchmarks.meter import cpu_seconds_of, find_postgres
from fhir_assets.definitions import build_definitions
from fhir_assets.ingestion.outcome import select_failed
from fhir_assets.ingestion.runs import Ingestion, Listener
from fhir_assets.orchestration.instance import config
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.settings import Settings, SourceKind, load_settings
from fhir_assets.warehouse.postgres.db import embedded, migrations
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.windows import Granularity


@dataclass(frozen=True, slots=True)
class Load:
    """One load: the resources in the tables at its end, its seconds, its processor seconds, and its seconds by part.

    ``processor`` includes ``postgres``, the processor seconds of Postgres.
    """

    resources: int
    seconds: float
    processor: float
    postgres: float
    parts: Mapping[str, float]

    @property
    def rate(self) -> float:
        """The resources per second."""
        return self.resources / self.seconds


class Storage(Enum):
    """The storage of Dagster's instance: the project's batched event log, or dagster-postgres' own storage."""

    OWN = "own"
    STOCK = "stock"


@contextmanager
def deployed(
    home: Path, storage: Storage = Storage.OWN, /, **settings: object
) -> Iterator[tuple[Ingestion, dg.DagsterInstance]]:
    """Yield a new deployment in ``home`` with an embedded database, and its Dagster instance."""
    for name in ("DAGSTER_HOME", "DAGSTER_POSTGRES_URL"):
        os.environ.pop(name, None)
    loaded = load_settings(fhir_assets_home=home, db_url=None, **settings)
    migrations.upgrade(embedded.ensure(loaded.home))
    if storage is Storage.STOCK:
        os.environ["DAGSTER_HOME"] = str(_write_stock_instance(loaded))
    instance = config.open_instance(loaded)
    ingestion = Ingestion(loaded, build_definitions(loaded), instance)
    ingestion.count_steps()
    try:
        yield ingestion, instance
    finally:
        instance.dispose()


def _write_stock_instance(settings: Settings) -> Path:
    """Write the project's ``dagster.yaml`` with ``storage: postgres:``, and return its folder."""
    content = yaml.safe_load(config.render_dagster_yaml(settings))
    content["storage"] = {"postgres": {"postgres_url": {"env": "DAGSTER_POSTGRES_URL"}}}
    folder = settings.home / "stock"
    folder.mkdir()
    (folder / "dagster.yaml").write_text(yaml.safe_dump(content))
    return folder


def load(home: Path, source: Path, *, listener: Listener | None = None, **settings: object) -> Load:
    """Load all files of ``source`` by in-process runs of ``incremental_load``. ``listener`` receives their events."""
    source_settings = {
        "fhir_base_url": str(source),
        "fhir_source": SourceKind.NDJSON,
        "fhir_partition": Granularity.MONTHLY,
    }
    with deployed(home, **source_settings, **settings) as (ingestion, instance):
        parts: defaultdict[str, float] = defaultdict(float)
        postgres = find_postgres(home)
        before, postgres_before = cpu_seconds(home), cpu_seconds_of(postgres)
        started = perf_counter()
        due = ingestion.due_loads.find()
        ingestion.due_loads.begin_checkpoints(due)
        parts["due windows"] = perf_counter() - started
        outcomes = [
            ingestion.load(windows, refresh=Refresh.MISSING, triggered_by="benchmark", listener=listener)
            for windows in due
        ]
        seconds = perf_counter() - started
        processor, in_postgres = cpu_seconds(home) - before, cpu_seconds_of(postgres) - postgres_before
        if select_failed(outcomes):
            raise SystemExit("the load failed: there is nothing to measure")
        for outcome in outcomes:
            for step in instance.get_run_step_stats(outcome.run_id):
                if step.start_time and step.end_time:
                    parts[step.step_key.split("__")[0]] += step.end_time - step.start_time
        parts["Dagster between the steps"] = seconds - sum(parts.values())
        with connect(embedded.ensure(home)) as conn:
            (count,) = conn.execute("SELECT count(*) FROM fhir.resource").fetchone() or (0,)
        return Load(count, seconds, processor, in_postgres, parts)
