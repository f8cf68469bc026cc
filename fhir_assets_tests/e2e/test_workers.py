"""Several worker processes give the same tables; a killed worker fails its run and no partial window is stored."""

from pathlib import Path
from typing import Any

import pytest

from fhir_assets.pipeline.load.row_builder import Batch
from fhir_assets.pipeline.workers import pool
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.storage import store
from fhir_assets.warehouse.ops import runs
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.deployment import Deploy
from fhir_assets_tests.support.small_population import END, RESOURCE_TYPES, START

pytestmark = pytest.mark.slow


@pytest.fixture
def population(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of resources, some invalid. Thresholds are lowered, so that the workers get a small load."""
    monkeypatch.setattr(pool, "MIN_SECONDS_TO_START", 0)
    monkeypatch.setattr(pool, "MIN_SECONDS_TO_SHARE", 0)
    monkeypatch.setattr(pool, "UNIT_BYTES", 20_000)
    monkeypatch.setattr(store, "BATCH_BYTES", 20_000)
    write_population(tmp_path / "population", Population(20, 3, 0.05, end=END, start=START))
    return str(tmp_path / "population")


def test_several_workers_give_the_tables_and_dead_letters_of_one_process(
    deploy: Deploy, population: str, empty_database: str
) -> None:
    settings = {"fhir_source": "ndjson", "fhir_base_url": population, "fhir_resource_types": RESOURCE_TYPES}
    one = deploy(home="one", fhir_workers=1, **settings)
    three = deploy(home="three", url=empty_database, fhir_workers=3, **settings)
    for deployment in (one, three):
        assert all(outcome.success for outcome in deployment.ingest())
    assert three.count_dead_letters() == one.count_dead_letters()
    assert sum(one.count_dead_letters().values())
    assert three.tables() == one.tables()


def test_a_worker_killed_during_a_load_fails_the_run_with_one_clear_error_and_the_next_run_completes(
    deploy: Deploy, population: str, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "fhir_source": "ndjson",
        "fhir_base_url": population,
        "fhir_resource_types": "Observation",
        "fhir_last_updated_gte": "2024-01-01",
        "fhir_partition": "monthly",
    }
    clean = deploy(home="clean", fhir_workers=1, **settings)
    assert all(outcome.success for outcome in clean.ingest())
    killed = deploy(home="killed", url=empty_database, fhir_workers=2, **settings)
    ask = pool.WorkerProcess.ask
    batches = 0

    def ask_and_kill_at_third_batch(self: pool.WorkerProcess, job: bytes, items: list[Any]) -> Any:
        nonlocal batches
        batches += isinstance(items[0], Batch)
        if batches == 3:
            self.kill()
        return ask(self, job, items)

    with monkeypatch.context() as patch:
        patch.setattr(pool.WorkerProcess, "ask", ask_and_kill_at_third_batch)
        outcomes = killed.ingest()
    failed = [outcome for outcome in outcomes if not outcome.success]
    assert len(failed) == 1
    with connect(killed.url) as conn:
        (reason,) = runs.get_errors(conn, failed[0].run_id)
    assert "a worker process was killed by signal 9 (SIGKILL)" in reason
    assert killed.count_loaded() == {}
    assert all(outcome.success for outcome in killed.ingest())
    assert killed.tables() == clean.tables()
    assert killed.count_dead_letters() == clean.count_dead_letters()
