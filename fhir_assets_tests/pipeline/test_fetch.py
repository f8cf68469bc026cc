"""Fetches of windows from a real server into a real store, at times that the tests set."""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.record import read_header
from fhir_assets.fhir.search.source import SearchSource
from fhir_assets.pipeline.fetch.step import FetchStep, RawUpdate
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.sandbox.faults import Fault, FaultKind, RequestKind
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.storage.store import Store, open_store
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.windows import Granularity, Interval, WindowRange, WindowScheme
from fhir_assets_tests.support.content import add, list_search_intervals, patient

SCHEME = WindowScheme(Granularity.DAILY, datetime(2024, 1, 1, tzinfo=UTC), open_start=False)
OVERLAP = timedelta(minutes=2)
DAYS = [SCHEME.window(f"2024-01-0{day}") for day in (5, 6, 7)]


def at(clock: str, day: int = 5) -> datetime:
    return datetime.fromisoformat(f"2024-01-{day:02}T{clock}").replace(tzinfo=UTC)


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    with SandboxServer([patient("a", at("10:00:00"))]) as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path), NO_ENCRYPTION)


def fetch(
    server: SandboxServer,
    store: Store,
    now: datetime,
    *,
    refresh: Refresh = Refresh.MISSING,
    days: int = 1,
    dead_letters: list[DeadLetter] | None = None,
) -> RawUpdate:
    """Fetch windows at ``now`` and commit the update."""
    source = SearchSource(FhirClient(server.url), page_size=2)
    fetcher = FetchStep(
        source,
        store,
        run_id="run",
        now=now,
        overlap=OVERLAP,
        refresh=refresh,
        write_dead_letters=(dead_letters if dead_letters is not None else []).extend,
    )
    (update,) = fetcher.run(["Patient"], WindowRange(DAYS[:days]))
    store.commit(update.manifests)
    return update


def ids(store: Store, key: str = "2024-01-05") -> list[str | None]:
    manifest = store.manifest("raw", "Patient", key)
    assert manifest
    return [read_header(line).id for batch in store.batches(manifest.parts) for line in batch]


def test_the_open_window_is_fetched_from_its_checkpoint_less_the_overlap(server: SandboxServer, store: Store) -> None:
    fetch(server, store, at("11:00:00"))
    add(server, patient("b", at("11:30:00")))
    fetch(server, store, at("12:00:00"))
    fetch(server, store, at("13:00:00"))
    assert list_search_intervals(server) == [
        ("2024-01-05T00:00:00.000Z", "2024-01-05T11:00:00.000Z"),
        ("2024-01-05T10:58:00.000Z", "2024-01-05T12:00:00.000Z"),
        ("2024-01-05T11:58:00.000Z", "2024-01-05T13:00:00.000Z"),
    ]
    assert ids(store) == ["a", "b"]


def test_a_resource_committed_late_within_the_overlap_is_fetched_without_duplicates_of_others(
    server: SandboxServer, store: Store
) -> None:
    add(server, patient("b", at("10:59:00")))
    fetch(server, store, at("11:00:00"))
    add(server, patient("late", at("10:58:30")))
    update = fetch(server, store, at("12:00:00"))
    assert ids(store) == ["a", "b", "late"]
    (counts,) = update.fetches.values()
    assert (counts.server_total, counts.matched, counts.repeated) == (2, 2, 1)


def test_a_resource_updated_within_the_overlap_is_kept_in_both_versions(server: SandboxServer, store: Store) -> None:
    add(server, patient("b", at("10:59:00")))
    fetch(server, store, at("11:00:00"))
    add(server, patient("b", at("10:59:30"), version="2"))
    fetch(server, store, at("12:00:00"))
    assert ids(store) == ["a", "b", "b"]


def test_a_full_refresh_fetches_the_open_window_again_from_its_start(server: SandboxServer, store: Store) -> None:
    fetch(server, store, at("11:00:00"))
    before = store.manifest("raw", "Patient", "2024-01-05")
    update = fetch(server, store, at("12:00:00"), refresh=Refresh.FULL)
    after = store.manifest("raw", "Patient", "2024-01-05")
    assert list_search_intervals(server)[-1] == ("2024-01-05T00:00:00.000Z", "2024-01-05T12:00:00.000Z")
    assert ids(store) == ["a"]
    assert update.refetched_keys == ("2024-01-05",)
    assert before
    assert after
    assert not set(before.parts) & set(after.parts)


def test_a_complete_window_is_fetched_again_only_if_it_is_materialized(server: SandboxServer, store: Store) -> None:
    fetch(server, store, at("01:00:00", day=6))
    assert fetch(server, store, at("02:00:00", day=6)).manifests == ()
    assert len(list_search_intervals(server)) == 1
    fetch(server, store, at("02:00:00", day=6), refresh=Refresh.WINDOW)
    assert list_search_intervals(server) == [("2024-01-05T00:00:00.000Z", "2024-01-06T00:00:00.000Z")] * 2


def test_a_range_is_one_search_split_into_its_windows(server: SandboxServer, store: Store) -> None:
    add(server, patient("b", at("00:00:00", day=6)), patient("c", at("23:59:59", day=7)))
    fetch(server, store, at("12:00:00", day=9), days=3)
    assert list_search_intervals(server) == [("2024-01-05T00:00:00.000Z", "2024-01-08T00:00:00.000Z")]
    assert [ids(store, window.key) for window in DAYS] == [["a"], ["b"], ["c"]]


def test_a_lost_page_changes_the_counts_of_its_window_only(server: SandboxServer, store: Store) -> None:
    add(server, *(patient(f"b{n}", at(f"10:0{n}:00", day=6)) for n in range(5)))
    server.set_faults(Fault(kind=FaultKind.LOSE_PAGE, on=frozenset({RequestKind.PAGE}), times=1))
    update = fetch(server, store, at("12:00:00", day=9), days=2)
    counts = {key: (fetch_counts.server_total, fetch_counts.matched) for key, fetch_counts in update.fetches.items()}
    assert counts == {"2024-01-05": (1, 1), "2024-01-06": (5, 3)}


def test_a_wrong_total_of_the_server_is_in_the_counts(server: SandboxServer, store: Store) -> None:
    server.set_faults(Fault(kind=FaultKind.WRONG_TOTAL, by=3))
    (counts,) = fetch(server, store, at("11:00:00")).fetches.values()
    assert (counts.server_total, counts.matched) == (4, 1)


def test_an_update_during_the_fetch_is_no_fault(server: SandboxServer, store: Store) -> None:
    class SourceWithUpdate(SearchSource):
        def count(self, resource_type: str, interval: object) -> int | None:
            total = super().count(resource_type, interval)  # type: ignore[arg-type]
            add(server, patient("a", at("10:00:00", day=7), version="2"))
            return total

    fetcher = FetchStep(
        SourceWithUpdate(FhirClient(server.url)),
        store,
        run_id="run",
        now=at("12:00:00", day=6),
        overlap=OVERLAP,
        refresh=Refresh.MISSING,
        write_dead_letters=lambda dead_letters: None,
    )
    (update,) = fetcher.run(["Patient"], WindowRange(DAYS[:1]))
    (counts,) = update.fetches.values()
    assert (counts.server_total, counts.matched) == (0, 0)


def test_a_fetch_that_fails_leaves_the_partition_unchanged(server: SandboxServer, store: Store) -> None:
    fetch(server, store, at("11:00:00"))
    before = store.manifest("raw", "Patient", "2024-01-05")
    add(server, *(patient(f"b{n}", at(f"11:0{n}:00")) for n in range(5)))
    server.set_faults(Fault(kind=FaultKind.ERROR, on=frozenset({RequestKind.PAGE}), status=403))
    with pytest.raises(Exception, match="403"):
        fetch(server, store, at("12:00:00"))
    assert store.manifest("raw", "Patient", "2024-01-05") == before
    assert ids(store) == ["a"]
    server.set_faults()
    fetch(server, store, at("12:00:00"))
    assert ids(store) == ["a", *(f"b{n}" for n in range(5))]


def test_a_resource_without_an_id_becomes_a_dead_letter_of_its_window_and_is_counted(
    server: SandboxServer, store: Store, tmp_path: Path
) -> None:
    body = json.loads(patient("nameless", at("10:30:00")))
    dead_letters: list[DeadLetter] = []
    server.store.seed(json.dumps(body).encode(), 0)
    version = server.store.type_store("Patient").latest["nameless"]
    del body["id"]
    version.body = json.dumps(body).encode()
    update = fetch(server, store, at("11:00:00"), dead_letters=dead_letters)
    (counts,) = update.fetches.values()
    assert (counts.server_total, counts.matched, counts.rejected) == (2, 2, 1)
    assert [(dead_letter.stage, dead_letter.partition_key) for dead_letter in dead_letters] == [("fetch", "2024-01-05")]


class OldSnapshot(SearchSource):
    """A source that is complete up to a time in the past only, as a bulk export is."""

    def __init__(self, server: SandboxServer, until: datetime) -> None:
        super().__init__(FhirClient(server.url))
        self._until = until

    def complete_until(self, intervals: Mapping[str, Interval]) -> dict[str, datetime]:
        return dict.fromkeys(intervals, self._until)


@pytest.mark.parametrize(("until", "fails"), [(datetime(2001, 1, 1, tzinfo=UTC), True), (at("23:50:00", day=4), False)])
def test_a_snapshot_from_long_before_the_windows_is_an_error_and_one_from_just_before_is_none(
    server: SandboxServer, store: Store, until: datetime, fails: bool
) -> None:
    step = FetchStep(
        OldSnapshot(server, until),
        store,
        run_id="run",
        now=at("12:00:00"),
        overlap=OVERLAP,
        refresh=Refresh.MISSING,
        write_dead_letters=lambda rejected: None,
    )
    if fails:
        with pytest.raises(NotFhir, match=r"complete up to 2001-01-01 00:00 only .the transactionTime"):
            step.run(["Patient"], WindowRange(DAYS[:1]))
    else:
        assert step.run(["Patient"], WindowRange(DAYS[:1]))[0].manifests == ()
