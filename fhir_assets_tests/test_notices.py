"""Notices are collected once until they are drained, and reach the windows of the requests that they concern."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fhir_assets.errors import ServerRefused
from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.notices import Notice, Notices
from fhir_assets.pipeline.fetch.step import FetchStep
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.storage.store import open_store
from fhir_assets.windows import Granularity, Interval, WindowRange, WindowScheme

SCHEME = WindowScheme(Granularity.DAILY, datetime(2024, 1, 1, tzinfo=UTC), open_start=False)


class NoticingSource:
    """A source without resources that gives one notice for each type that it fetches, and one for all types."""

    name = "noticing"

    def __init__(self, *, one_pass: bool) -> None:
        self.one_pass = one_pass
        self.refused: Mapping[str, ServerRefused] = {}
        self._notices = Notices()

    def list_types(self) -> None:
        pass

    def compute_state(self) -> None:
        pass

    def find_extent(self, resource_types: Sequence[str]) -> None:
        pass

    def read_clock(self) -> None:
        pass

    def complete_until(self, intervals: Mapping[str, Interval]) -> dict[str, datetime]:
        return {}

    def count(self, resource_type: str, interval: Interval) -> int:
        return 0

    def fetch(self, resource_types: Sequence[str], interval: Interval) -> Iterator[Record | RejectedInput]:
        for name in resource_types:
            self._notices.add("error", "incomplete", f"{name} is incomplete", name)
        self._notices.add("warning", "slow", "the server is slow")
        return iter(())

    def drain_notices(self) -> tuple[Notice, ...]:
        return self._notices.drain()


def test_a_notice_is_collected_once_until_it_is_drained() -> None:
    notices = Notices()
    for _ in range(2):
        notices.add("error", "incomplete", "some are missing", "Patient")
    notices.add("warning", "slow", "the server is slow")
    first = Notice("error", "incomplete", "some are missing", "Patient")
    second = Notice("warning", "slow", "the server is slow")
    assert notices.drain() == (first, second)
    assert notices.drain() == ()
    notices.add("warning", "slow", "the server is slow")
    assert notices.drain() == (second,)


def _fetch(tmp_path: Path, *, one_pass: bool) -> dict[str, list[list[str]]]:
    step = FetchStep(
        NoticingSource(one_pass=one_pass),
        open_store(str(tmp_path), NO_ENCRYPTION),
        run_id="run",
        now=SCHEME.start + timedelta(days=2),
        overlap=timedelta(0),
        refresh=Refresh.MISSING,
        write_dead_letters=lambda rejected: None,
    )
    windows = WindowRange([SCHEME.window("2024-01-01"), SCHEME.window("2024-01-02")])
    updates = step.run(["Patient", "Encounter"], windows)
    return {
        update.resource_type: [
            [notice.code for notice in manifest.fetched.notices] for manifest in update.manifests if manifest.fetched
        ]
        for update in updates
    }


def test_the_notices_of_a_request_are_on_its_windows(tmp_path: Path) -> None:
    expected = {name: [["incomplete", "slow"]] * 2 for name in ("Patient", "Encounter")}
    assert _fetch(tmp_path / "separate", one_pass=False) == expected
    assert _fetch(tmp_path / "together", one_pass=True) == expected
