"""A load waits for a slot of FHIR_MAX_LOADERS before it writes to the tables."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.warehouse.postgres.db.semaphore import DistributedSemaphore
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.deployment import Deploy
from fhir_assets_tests.support.small_population import START


def test_a_load_writes_to_the_tables_only_while_it_holds_a_slot(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Patient.ndjson").write_bytes(patient("a", START) + b"\n")
    deployment = deploy(
        fhir_source="ndjson",
        fhir_base_url=str(tmp_path),
        fhir_resource_types="Patient",
        fhir_last_updated_gte="2024-01-01",
        fhir_max_loaders=1,
    )
    try_acquire, refused = DistributedSemaphore.try_acquire, []

    def record_refusals(self: DistributedSemaphore) -> int | None:
        number = try_acquire(self)
        if number is None:
            refused.append(self)
        return number

    monkeypatch.setattr(DistributedSemaphore, "try_acquire", record_refusals)
    connect_for_slots = partial(connect, deployment.url, autocommit=True)
    other = DistributedSemaphore(connect_for_slots, advisory_locks.TABLE_LOADS, 1)
    with ThreadPoolExecutor(1) as pool:
        with other.slot():
            load = pool.submit(deployment.ingest, first=START, last=START)
            while not refused and not load.done():
                time.sleep(0.01)
            assert refused
            assert deployment.count_loaded() == {}
        assert [outcome.success for outcome in load.result()] == [True]
    other.close()
    assert deployment.count_loaded() == {"Patient": 1}
