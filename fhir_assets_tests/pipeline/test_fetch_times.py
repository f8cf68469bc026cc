"""Fetches of resources whose ``meta.lastUpdated`` lies outside of what one expects: in the future, or in year 1."""

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fhir_assets.fhir.files.ndjson import NdjsonSource
from fhir_assets.fhir.record import read_header
from fhir_assets.pipeline.fetch.step import FetchStep
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.storage.store import Store, open_store
from fhir_assets.windows import Granularity, WindowRange, WindowScheme

SCHEME = WindowScheme(Granularity.DAILY, datetime(2024, 1, 4, tzinfo=UTC), open_start=True)
NOW = datetime(2024, 1, 6, 23, 58, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"), NO_ENCRYPTION)


def fetch(folder: Path, store: Store, *updated: datetime | str | None, now: datetime = NOW) -> dict[str, list[str]]:
    """Fetch Patients 0, 1, … with these times from a file, and return their ids by window."""
    folder.mkdir(exist_ok=True)
    path = folder / "Patient.ndjson"
    lines = []
    for number, moment in enumerate(updated):
        text = moment.isoformat() if isinstance(moment, datetime) else moment
        lines.append(json.dumps({"resourceType": "Patient", "id": str(number), "meta": {"lastUpdated": text}}))
    path.write_text("\n".join(lines) + "\n")
    os.utime(path, (NOW.timestamp() - 3600, NOW.timestamp() - 3600))
    source = NdjsonSource(str(folder), now=lambda: now)
    step = FetchStep(
        source,
        store,
        run_id="run",
        now=now,
        overlap=timedelta(),
        refresh=Refresh.MISSING,
        write_dead_letters=lambda _: None,
    )
    windows = WindowRange(list(SCHEME.between(SCHEME.start, now)), from_first=True)
    (update,) = step.run(["Patient"], windows)
    store.commit(update.manifests)
    assert not update.before_first_window
    return {
        manifest.partition_key: [
            read_header(line).id or "" for batch in store.batches(manifest.parts) for line in batch
        ]
        for manifest in update.manifests
        if manifest.parts
    }


def test_every_future_dated_resource_is_in_the_window_in_which_it_arrived(tmp_path: Path, store: Store) -> None:
    ahead = NOW + timedelta(minutes=4)
    found = fetch(
        tmp_path / "in", store, NOW - timedelta(days=1), ahead, NOW + timedelta(days=40), "9999-12-31T23:59:59Z"
    )
    assert found == {"2024-01-05": ["0"], "2024-01-06": ["1", "2", "3"]}


def test_a_resource_of_a_clock_that_was_ahead_moves_to_its_own_window_with_the_next_day(
    tmp_path: Path, store: Store
) -> None:
    ahead = NOW + timedelta(minutes=4)
    fetch(tmp_path / "in", store, ahead)
    assert fetch(tmp_path / "in", store, ahead, now=NOW + timedelta(minutes=10)) == {"2024-01-07": ["0"]}


def test_resources_of_the_first_years_are_in_the_first_window(tmp_path: Path, store: Store) -> None:
    found = fetch(tmp_path / "in", store, "0001-01-01T00:00:00+14:00", "0001-01-01T00:00:00Z", "1969-12-31T23:59:60Z")
    assert found == {"2024-01-04": ["0", "1", "2"]}
