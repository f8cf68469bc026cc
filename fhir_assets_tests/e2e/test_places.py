"""A load waits for its place among the loaders, and goes on when there is one."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fhir_assets.warehouse.postgres.db.semaphore import DistributedSemaphore, Kind
from fhir_assets_tests.e2e.conftest import Deploy
from fhir_assets_tests.e2e.test_crash import START
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.warehouse.test_places import places


def test_a_load_writes_to_the_tables_only_when_it_has_a_loaders_place(
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
    take, refused = DistributedSemaphore._take, []

    def watched(self: DistributedSemaphore) -> int | None:
        place = take(self)
        if place is None:
            refused.append(self._kind)
        return place

    monkeypatch.setattr(DistributedSemaphore, "_take", watched)
    other = places(deployment.url, 1, Kind.LOADERS)
    with ThreadPoolExecutor(1) as pool:
        with other.one():
            load = pool.submit(deployment.ingest, first=START, last=START)
            while not refused and not load.done():
                time.sleep(0.01)
            assert refused
            assert set(refused) == {Kind.LOADERS}
            assert deployment.loaded() == {}
        assert [outcome.success for outcome in load.result()] == [True]
    other.close()
    assert deployment.loaded() == {"Patient": 1}
