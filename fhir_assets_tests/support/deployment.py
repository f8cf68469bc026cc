"""A deployment for a test: its settings, store, database and Dagster instance, and the questions that tests ask.

The fixture ``deploy`` makes deployments; a test module or a conftest imports it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from psycopg import sql

from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.sources import build_binding
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.ingestion.outcome import Outcome
from fhir_assets.ingestion.runs import Ingestion
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.sources.transition import SourceTransition, TransitionResult
from fhir_assets.settings import Settings, load_settings
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.postgres.db import migrations
from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url
from fhir_assets_tests.support.databases import dagster_instance

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"

BOOKKEEPING = {"run_id", "loaded_at", "created_at", "arrived"}
"""Columns that say when and by which run a row arrived and was loaded; comparisons leave them out."""

Row = tuple[Any, ...]


@dataclass
class Deployment:
    """A deployment, with the actions and queries of tests."""

    settings: Settings
    instance: dg.DagsterInstance

    @property
    def url(self) -> str:
        assert self.settings.db_url
        return self.settings.db_url.get_secret_value()

    @property
    def store(self) -> Store:
        return build_store(self.settings)

    def change_source(self, action: Callable[[SourceTransition], TransitionResult]) -> TransitionResult:
        """Carry the state of the source over or start anew, as `fhir-assets sources` does."""
        warehouse = Warehouse(self.settings)
        binding = build_binding(self.settings, warehouse)
        result = action(SourceTransition(binding, warehouse.connect, binding.store, actor="test"))
        ingestion = self.ingestion()
        for windows in ingestion.find_received():
            assert ingestion.load_received(windows, triggered_by="test").success
        return result

    def environment(self) -> dict[str, str]:
        """Return the environment variables of the deployment's commands and processes."""
        settings = self.settings
        return {
            "DAGSTER_HOME": str(settings.home / "dagster"),
            "DAGSTER_POSTGRES_URL": normalise_url(self.url, "psycopg2"),
            "DB_URL": self.url,
            "FHIR_ASSETS_HOME": str(settings.home),
            "FHIR_BASE_URL": settings.fhir_base_url,
            "FHIR_SOURCE": settings.fhir_source.value,
            "FHIR_RESOURCE_TYPES": ",".join(settings.fhir_resource_types),
            "FHIR_LAST_UPDATED_GTE": settings.window_scheme.start.isoformat(),
            "FHIR_PARTITION": settings.fhir_partition.value,
            "FHIR_OVERLAP_SECONDS": "0",
        }

    def ingestion(self) -> Ingestion:
        return Ingestion(self.settings, build_definitions(self.settings), self.instance)

    def ingest(
        self,
        *,
        first: datetime | None = None,
        last: datetime | None = None,
        refresh: Refresh = Refresh.MISSING,
    ) -> list[Outcome]:
        """Load the due windows, as `fhir-assets ingest` does."""
        ingestion = self.ingestion()
        ingestion.fail_dead_runs()
        due = ingestion.due_loads.find(first=first, last=last, all_windows=refresh is Refresh.FULL)
        ingestion.due_loads.begin_checkpoints(due)
        return [ingestion.load(windows, refresh=refresh, triggered_by="test") for windows in due]

    def query(self, statement: str, *params: object) -> list[Row]:
        with connect(self.url) as conn:
            return conn.execute(statement, params).fetchall()

    def tables(self) -> dict[str, list[str]]:
        """Return every row of schema fhir as text, sorted, without the BOOKKEEPING columns."""
        rows_by_table: dict[str, list[str]] = {}
        with connect(self.url) as conn:
            names = conn.execute(
                "SELECT table_name FROM information_schema.tables WHERE table_schema = 'fhir' ORDER BY 1"
            ).fetchall()
            for (name,) in names:
                columns = [
                    sql.Identifier(column)
                    for (column,) in conn.execute(
                        "SELECT column_name FROM information_schema.columns WHERE table_schema = 'fhir'"
                        " AND table_name = %s ORDER BY ordinal_position",
                        (name,),
                    ).fetchall()
                    if column not in BOOKKEEPING
                ]
                rows = conn.execute(
                    sql.SQL("SELECT ROW({})::text FROM fhir.{}").format(
                        sql.SQL(", ").join(columns), sql.Identifier(name)
                    )
                ).fetchall()
                rows_by_table[name] = sorted(row for (row,) in rows)
        return rows_by_table

    def count_loaded(self) -> dict[str, int]:
        """Return the number of resources in the tables by resource type."""
        return dict(self.query("SELECT resource_type, count(*) FROM fhir.resource GROUP BY 1"))

    def count_dead_letters(self) -> dict[str, int]:
        """Return the number of open dead letters by rule."""
        return dict(
            self.query("SELECT rule, sum(occurrences)::bigint FROM ops.dead_letters WHERE status = 'open' GROUP BY 1")
        )

    def checks(self, run_id: str, name: str = "reconciles") -> list[dg.AssetCheckEvaluation]:
        """Return the evaluations of one check in a run."""
        records = self.instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION).records
        return [
            event.event_specific_data
            for record in records
            if (event := record.event_log_entry.dagster_event)
            and isinstance(event.event_specific_data, dg.AssetCheckEvaluation)
            and event.event_specific_data.check_name == name
        ]

    def unreconciled(self, outcome: Outcome) -> list[str]:
        """Return the descriptions of the failed checks of a run. Fail if the run has no check."""
        evaluations = self.checks(outcome.run_id)
        assert evaluations
        return [e.description or "" for e in evaluations if not e.passed]


Deploy = Callable[..., Deployment]


@pytest.fixture
def deploy(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deploy]:
    """Make deployments on the test's database, with settings given by name.

    Deployments of one test need different values of ``home``. Dagster's storage is in the same database.
    """
    instances = []
    monkeypatch.setenv("DAGSTER_EVENT_BATCH_SIZE", "100")

    def make(*, home: str = "home", url: str | None = None, **settings: object) -> Deployment:
        folder = tmp_path / home
        monkeypatch.setenv("DAGSTER_POSTGRES_URL", normalise_url(url or database, "psycopg2"))
        instance = dagster_instance(folder / "dagster", url or database)
        instances.append(instance)
        migrations.upgrade(url or database)
        values = {"db_url": url or database, "fhir_assets_home": folder, "fhir_overlap_seconds": 0, **settings}
        return Deployment(load_settings(**values), instance)

    yield make
    for instance in instances:
        instance.dispose()
