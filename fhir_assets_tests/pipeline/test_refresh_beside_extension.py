"""A full refresh of a window beside another run that fetches or receives into it: raw keeps what either of them read.

The refresh stops after it has read the server and before it commits, while the other run does all of its work.
"""

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from fhir_assets.errors import Overtaken
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.record import read_header
from fhir_assets.fhir.search.source import SearchSource
from fhir_assets.fhir.validation import Validator
from fhir_assets.pipeline import partition_commit
from fhir_assets.pipeline.fetch.extend import ExtendStep, LayerRules
from fhir_assets.pipeline.fetch.step import FetchStep
from fhir_assets.pipeline.partition_commit import commit_update
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.ops import checkpoints
from fhir_assets.windows import WindowRange
from fhir_assets_tests.support import content
from fhir_assets_tests.support.content import add
from fhir_assets_tests.support.interleaving import Outcome, Point, interleave
from fhir_assets_tests.support.small_hospital import DAY, KEY, SmallHospital, build_patient

OVERLAP = timedelta(minutes=2)
COMMITS = Point(partition_commit, "rewrite_partitions")


def at(hours: float) -> datetime:
    return DAY + timedelta(hours=hours)


def patient(identity: str, moment: datetime) -> bytes:
    return content.patient(identity, moment, name=[{"family": f"F{identity}"}])


class FetchingHospital(SmallHospital):
    """A small deployment whose source is a server."""

    def __init__(self, server: SandboxServer, url: str, folder: Path) -> None:
        super().__init__(url, folder)
        self._server = server

    def fetch(self, run_id: str, now: datetime, refresh: Refresh = Refresh.MISSING) -> None:
        """Fetch the window up to ``now`` and commit it."""
        step = FetchStep(
            SearchSource(FhirClient(self._server.url), page_size=5),
            self.store,
            run_id=run_id,
            now=now,
            overlap=OVERLAP,
            refresh=refresh,
            write_dead_letters=lambda _: None,
        )
        for update in step.run(["Patient"], WindowRange([self.scheme.window(KEY)])):
            commit_update(self.connect, self.store, update)

    def ingest(self, run_id: str, now: datetime) -> None:
        """Fetch, validate and load what is new in the window."""
        with self.live_run(run_id):
            self.fetch(run_id, now)
            self.validate(run_id, refresh=Refresh.MISSING)
            self.load_tables(run_id, refresh=Refresh.MISSING)

    def move_on(self, now: datetime) -> list[str]:
        """Extend the window without a run, as a tick without news does."""
        step = ExtendStep(
            SearchSource(FhirClient(self._server.url), page_size=5),
            self.store,
            self.connect,
            LayerRules(Validator().rules_version, self.views),
            now=now,
            overlap=OVERLAP,
        )
        return step.run(["Patient"], WindowRange([self.scheme.window(KEY)]), seconds=60)

    def find_raw(self) -> list[str]:
        """Return the ids of the resources in raw, sorted."""
        manifest = self.store.manifest("raw", "Patient", KEY)
        assert manifest
        return sorted(str(read_header(line).id) for batch in self.store.batches(manifest.parts) for line in batch)

    def find_until(self) -> tuple[datetime, bool]:
        """Return up to when the window is fetched, and whether it is complete."""
        manifest = self.store.manifest("raw", "Patient", KEY)
        assert manifest
        assert manifest.fetched
        return manifest.fetched.until, manifest.fetched.complete

    def find_checkpoint(self) -> datetime:
        """Return the time up to which the type is loaded."""
        with self.connect() as conn:
            return checkpoints.get(conn, ["Patient"])["Patient"].loaded_until


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    with SandboxServer([patient("a", at(1))]) as server:
        yield server


@pytest.fixture
def hospital(server: SandboxServer, database: str, tmp_path: Path) -> FetchingHospital:
    """A deployment whose window is loaded up to two o'clock."""
    hospital = FetchingHospital(server, database, tmp_path)
    with hospital.connect() as conn:
        checkpoints.begin(conn, ["Patient"], DAY, source_state=None)
    hospital.ingest("first", at(2))
    return hospital


def refresh_beside(
    hospital: FetchingHospital,
    monkeypatch: pytest.MonkeyPatch,
    other: Callable[[], object],
    *,
    refresh: Callable[[], object] | None = None,
) -> Outcome:
    """Refresh the window at three o'clock; the other run works between its reading and its commit."""
    first = refresh or (lambda: hospital.fetch("refresh", at(3), Refresh.FULL))
    return interleave(hospital.url, monkeypatch, first, COMMITS, other)


def assert_everything_is_in_raw_and_reconciles(hospital: FetchingHospital, *expected: str) -> None:
    assert hospital.find_raw() == sorted(expected)
    hospital.load("last", refresh=Refresh.MISSING)
    assert sorted(hospital.find_loaded()) == sorted(set(expected))
    assert hospital.count_window().faults == []


def test_what_a_later_run_fetches_during_a_refresh_stays_in_raw(
    hospital: FetchingHospital, server: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_news() -> None:
        add(server, patient("b", at(3.5)))
        hospital.ingest("news", at(4))

    refresh_beside(hospital, monkeypatch, load_news).raise_errors()
    assert hospital.find_until() == (at(4), False)
    assert hospital.find_checkpoint() == at(4)
    assert_everything_is_in_raw_and_reconciles(hospital, "a", "b")


def test_a_window_that_a_later_run_completes_during_a_refresh_stays_complete(
    hospital: FetchingHospital, server: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def complete() -> None:
        add(server, patient("b", at(23)))
        hospital.ingest("news", at(25))

    refresh_beside(hospital, monkeypatch, complete).raise_errors()
    assert hospital.find_until() == (at(24), True)
    assert_everything_is_in_raw_and_reconciles(hospital, "a", "b")


def test_what_a_refresh_reads_during_a_run_that_extends_the_window_stays_in_raw(
    hospital: FetchingHospital, server: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other order: the extension stops before its commit."""
    add(server, patient("b", at(2.5)))

    def refresh() -> None:
        add(server, patient("late", at(1.5)), patient("c", at(3.5)))
        hospital.fetch("refresh", at(4), Refresh.FULL)

    refresh_beside(hospital, monkeypatch, refresh, refresh=lambda: hospital.ingest("news", at(3))).raise_errors()
    assert hospital.find_until() == (at(4), False)
    assert set(hospital.find_raw()) == {"a", "b", "late", "c"}
    assert_everything_is_in_raw_and_reconciles(hospital, "a", "b", "b", "c", "late")


def test_of_two_refreshes_the_reading_that_reaches_further_is_kept(
    hospital: FetchingHospital, server: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refresh_later() -> None:
        add(server, patient("b", at(3.5)))
        hospital.fetch("later", at(4), Refresh.FULL)

    refresh_beside(hospital, monkeypatch, refresh_later).raise_errors()
    assert hospital.find_until() == (at(4), False)
    assert_everything_is_in_raw_and_reconciles(hospital, "a", "b")


def test_of_two_first_loads_of_a_window_the_reading_that_reaches_further_is_kept(
    server: SandboxServer, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital = FetchingHospital(server, database, tmp_path)

    def load_later() -> None:
        add(server, patient("b", at(3.5)))
        hospital.ingest("later", at(4))

    refresh_beside(hospital, monkeypatch, load_later, refresh=lambda: hospital.fetch("earlier", at(3))).raise_errors()
    assert hospital.find_until() == (at(4), False)
    assert_everything_is_in_raw_and_reconciles(hospital, "a", "b")


def test_a_tick_without_news_during_a_refresh_moves_the_window_on(
    hospital: FetchingHospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresh_beside(hospital, monkeypatch, lambda: hospital.move_on(at(4))).raise_errors()
    assert hospital.find_until() == (at(4), False)
    assert hospital.find_checkpoint() == at(4)
    assert_everything_is_in_raw_and_reconciles(hospital, "a")


def test_what_is_received_during_a_refresh_stays_in_raw(
    hospital: FetchingHospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Landing files, HTTP posts and missing references are received in the same way."""
    refresh_beside(
        hospital, monkeypatch, lambda: hospital.receive(build_patient("received"), origin="landing:x")
    ).raise_errors()
    assert_everything_is_in_raw_and_reconciles(hospital, "a", "received")


def test_a_reading_that_ends_before_the_complete_window_it_would_replace_is_refused(
    hospital: FetchingHospital, server: SandboxServer
) -> None:
    """The clock of a server, or the snapshot of an export, is behind what was loaded before."""
    add(server, patient("b", at(23)))
    hospital.ingest("complete", at(25))
    with pytest.raises(
        Overtaken, match="Patient of 2024-01-05 is complete, but this run fetched it only up to 2024-01-05 03"
    ):
        hospital.fetch("refresh", at(3), Refresh.FULL)
    assert_everything_is_in_raw_and_reconciles(hospital, "a", "b")
