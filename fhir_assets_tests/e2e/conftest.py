"""A deployment of its own for a test: store, database, Dagster instance, all real and thrown away afterwards."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from psycopg import sql

from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.store import build_store
from fhir_assets.ingestion import Ingestion, Outcome
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.settings import Settings, load_settings
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.postgres.db import migrations
from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url
from fhir_assets_tests.support.databases import dagster_instance

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"

BOOKKEEPING = {"run_id", "loaded_at"}
"""Columns that say how a row came, not what it says."""

Row = tuple[Any, ...]


@dataclass
class Deployment:
    """What a test does with a deployment, and what it looks at."""

    settings: Settings
    instance: dg.DagsterInstance

    @property
    def url(self) -> str:
        assert self.settings.db_url
        return self.settings.db_url.get_secret_value()

    @property
    def store(self) -> Store:
        return build_store(self.settings)

    def environment(self) -> dict[str, str]:
        """What its commands and processes find in their environment."""
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
        """What `fhir-assets ingest` does."""
        ingestion = self.ingestion()
        due = ingestion.find_due(first=first, last=last, all_windows=refresh is Refresh.FULL)
        ingestion.begin_checkpoints(due)
        return [ingestion.load(windows, refresh=refresh, triggered_by="test") for windows in due]

    def query(self, statement: str, *params: object) -> list[Row]:
        with connect(self.url) as conn:
            return conn.execute(statement, params).fetchall()

    def tables(self) -> dict[str, list[str]]:
        """Every row of schema fhir as text, sorted, without the bookkeeping."""
        found: dict[str, list[str]] = {}
        with connect(self.url) as conn:
            names = conn.execute(
                "SELECT table_name FROM information_schema.tables WHERE table_schema = 'fhir'"
                " AND table_name NOT LIKE 'resource\\_%' ORDER BY 1"
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
                found[name] = sorted(row for (row,) in rows)
        return found

    def loaded(self) -> dict[str, int]:
        """How many resources each type has in the tables."""
        return dict(self.query("SELECT resource_type, count(*) FROM fhir.resource GROUP BY 1"))

    def dead(self) -> dict[str, int]:
        """How many dead letters are open, by rule."""
        return dict(
            self.query("SELECT rule, sum(occurrences)::bigint FROM ops.dead_letters WHERE status = 'open' GROUP BY 1")
        )

    def checks(self, run_id: str, name: str = "reconciles") -> list[dg.AssetCheckEvaluation]:
        """Every evaluation of one check in a run."""
        records = self.instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION).records
        return [
            event.event_specific_data
            for record in records
            if (event := record.event_log_entry.dagster_event)
            and isinstance(event.event_specific_data, dg.AssetCheckEvaluation)
            and event.event_specific_data.check_name == name
        ]

    def unreconciled(self, outcome: Outcome) -> list[str]:
        """What the failed checks of a run say; fails if there was no check at all."""
        evaluations = self.checks(outcome.run_id)
        assert evaluations
        return [e.description or "" for e in evaluations if not e.passed]


Deploy = Callable[..., Deployment]


@pytest.fixture
def deploy(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deploy]:
    """Makes deployments on the test's database; settings by name. ``home`` tells several of one test apart.

    Dagster's storage is the project's own, in the same database.
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
