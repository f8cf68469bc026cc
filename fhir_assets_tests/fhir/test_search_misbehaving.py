"""A server that misbehaves at random loses nothing silently: what it has is stored, a dead letter, or something is red.

A share of the steps (one HTTP answer each) runs with every test run. SEARCH_STEPS=1000000 runs more of them, as
`make search-steps` does.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from fhir_assets.errors import FhirAssetsError
from fhir_assets.fhir.search import pager
from fhir_assets.fhir.search.source import SearchSource
from fhir_assets.pipeline.fetch.step import FetchStep, RawUpdate
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.storage.store import Store, open_store
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.windows import Granularity, WindowRange, WindowScheme
from fhir_assets_tests.support.misbehaving_server import (
    FORMS,
    HIDING,
    LOSING,
    PAGING,
    PARAMETERS,
    TRANSIENT,
    InProcessClient,
    MisbehavingServer,
    Resource,
)

T = TypeVar("T")

SCHEME = WindowScheme(Granularity.DAILY, datetime(2024, 1, 1, tzinfo=UTC), open_start=True)
NOW = datetime(2024, 1, 6, 12, tzinfo=UTC)
STEPS = int(os.environ.get("SEARCH_STEPS", "4000"))
STEPS_OF_AN_EXAMPLE = 15
"""The average, a little rounded down."""

_faults = st.one_of(
    st.sets(st.sampled_from([*FORMS, *PARAMETERS, *PAGING, *TRANSIENT]), max_size=8),
    st.sets(st.sampled_from([*FORMS, *PARAMETERS, *PAGING, *TRANSIENT, *LOSING]), max_size=8).map(
        lambda names: names - HIDING
    ),
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    shared_memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(dir=shared_memory if shared_memory.is_dir() else None))
    yield path
    shutil.rmtree(path)


def _make_resources(count: int, random: Random) -> list[Resource]:
    """Return patients of a week that begins before the first window, some of them without ``meta``."""
    undated = random.choice((0.0, 0.0, 0.3))
    hours = [None if random.random() < undated else random.randrange(-40, 130) for _ in range(count)]
    return [_resource(number, hour) for number, hour in enumerate(hours)]


def _resource(number: int, hours: int | None) -> Resource:
    body = {"resourceType": "Patient", "id": f"p{number}"}
    if hours is None:
        return body
    moment = SCHEME.start + timedelta(hours=hours, seconds=number)
    return {**body, "meta": {"lastUpdated": moment.isoformat(), "versionId": "1"}}


def _call_now(call: Callable[[], T]) -> Future[T]:
    """Call in this thread, so that the draws of an example have one order."""
    future: Future[T] = Future()
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
    return future


@pytest.fixture(autouse=True)
def _without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pager, "_start", _call_now)


def _load(server: MisbehavingServer, store: Store, dead_letters: list[DeadLetter], page_size: int) -> RawUpdate:
    source = SearchSource(InProcessClient(server), page_size=page_size, now=lambda: NOW)
    extent = source.find_extent(["Patient"])
    start = NOW if extent is None else extent.start or SCHEME.start
    step = FetchStep(
        source,
        store,
        run_id="run",
        now=NOW,
        overlap=timedelta(minutes=2),
        refresh=Refresh.MISSING,
        write_dead_letters=dead_letters.extend,
    )
    (update,) = step.run(["Patient"], WindowRange(list(SCHEME.between(start, NOW))))
    return update


def _is_red(update: RawUpdate) -> bool:
    return any(
        any(notice.severity == "error" for notice in fetch.notices)
        or (fetch.server_total is not None and fetch.server_total != fetch.matched)
        for fetch in update.fetches.values()
    )


def _stored_ids(store: Store, update: RawUpdate) -> set[str]:
    parts = [part for manifest in update.manifests for part in manifest.parts]
    return {json.loads(line)["id"] for batch in store.batches(parts) for line in batch}


@settings(max_examples=STEPS // STEPS_OF_AN_EXAMPLE, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 40), _faults, st.sampled_from([0.03, 0.2, 0.7]), st.sampled_from([1, 2, 5, 100]), st.integers(0))
def test_nothing_is_lost_in_silence(
    folder: Path, count: int, faults: set[str], rate: float, page_size: int, seed: int
) -> None:
    random = Random(seed)
    server = MisbehavingServer(_make_resources(count, random), sorted(faults), rate, random, NOW)
    path = tempfile.mkdtemp(dir=folder)
    store = open_store(path, NO_ENCRYPTION)
    dead_letters: list[DeadLetter] = []
    update = None
    with suppress(FhirAssetsError):
        update = _load(server, store, dead_letters, page_size)
    is_green = update is not None and not _is_red(update)
    event("green" if is_green else "red")
    if update is not None and is_green:
        missing = {f"p{n}" for n in range(count)} - _stored_ids(store, update)
        assert missing <= {letter.resource_id for letter in dead_letters}
    shutil.rmtree(path)


def test_a_server_without_faults_is_not_red(folder: Path) -> None:
    resources = [_resource(n, hours) for n, hours in enumerate([-30, 0, 24, 25, 70, 131, 90])]
    server = MisbehavingServer(resources, [], 0, Random(1), NOW)
    store = open_store(tempfile.mkdtemp(dir=folder), NO_ENCRYPTION)
    dead_letters: list[DeadLetter] = []
    update = _load(server, store, dead_letters, 2)
    assert not _is_red(update)
    assert _stored_ids(store, update) == {item["id"] for item in resources}
    assert dead_letters == []
