"""The server's clock bounds the present: this machine's clock may be wrong."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from fhir_assets.fhir.client.clock import DATE_PRECISION, ServerClock
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.search.source import SearchSource
from fhir_assets.notices import Notices
from fhir_assets.pipeline.due_windows import find_due_windows
from fhir_assets.pipeline.fetch.step import FetchStep
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.storage.store import open_store
from fhir_assets.warehouse.postgres.db.connections import Session
from fhir_assets.windows import LATEST, Granularity, WindowRange, WindowScheme
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply
from fhir_assets_tests.support.search_server import SearchServer, resource

NOW = datetime(2024, 6, 10, 12, tzinfo=UTC)
SCHEME = WindowScheme(Granularity.DAILY, datetime(2024, 1, 1, tzinfo=UTC), open_start=False)


def _date(moment: datetime) -> str:
    return format_datetime(moment, usegmt=True)


def _observe(skew: timedelta, seconds: float = 0, **headers: str) -> tuple[ServerClock, list[str]]:
    """Return the clock after one response whose Date differs from NOW by ``skew``, and the messages of its notices."""
    notices = Notices()
    clock = ServerClock(notices, "the server", now=lambda: NOW, monotonic=lambda: 0)
    for _ in range(2):
        clock.observe({"Date": _date(NOW + skew), **headers}, seconds)
    return clock, [f"{notice.severity}: {notice.message}" for notice in notices.drain()]


@pytest.mark.parametrize(
    ("skew", "said"),
    [
        (timedelta(hours=-26), "warning: the clock of this machine is 26 hours ahead of that of the server"),
        (timedelta(minutes=-2), "warning: the clock of this machine is 2 minutes ahead of"),
        (timedelta(minutes=3), "warning: the clock of this machine is 3 minutes behind that of the server"),
        (timedelta(days=-30), "error: the clock of this machine is 30 days ahead of"),
    ],
)
def test_a_difference_of_more_than_a_minute_is_said_once(skew: timedelta, said: str) -> None:
    clock, (message,) = _observe(skew)
    assert message.startswith(said)
    assert clock.read() == NOW + skew + DATE_PRECISION


@pytest.mark.parametrize(
    ("skew", "seconds", "headers"),
    [
        (timedelta(seconds=50), 0, {}),
        (timedelta(seconds=-59), 0, {}),
        (timedelta(seconds=-150), 100, {}),
        (timedelta(hours=-1), 0, {"Age": "3600"}),
    ],
    ids=["a little ahead", "a little behind", "an answer that took long", "an answer that a cache kept"],
)
def test_a_small_or_explained_difference_is_not_said(skew: timedelta, seconds: float, headers: dict[str, str]) -> None:
    assert _observe(skew, seconds, **headers)[1] == []


@pytest.mark.parametrize("date", ["", "yesterday", "Mon, 99 Jun 2024 12:00:00 GMT", "-1"])
def test_the_clock_is_unknown_without_a_valid_date(date: str) -> None:
    clock = ServerClock(Notices(), "the server")
    clock.observe({"Date": date} if date else {}, 0)
    assert clock.read() is None


@pytest.mark.parametrize("age", ["0", "3600", "9" * 5000])
def test_a_date_at_the_end_of_the_year_9999_is_a_time(age: str) -> None:
    clock = ServerClock(Notices(), "the server", now=lambda: NOW)
    clock.observe({"Date": "Fri, 31 Dec 9999 23:59:59 GMT", "Age": age}, 0)
    assert clock.read() == LATEST


def test_the_earliest_of_several_dates_counts() -> None:
    clock = ServerClock(Notices(), "the server", now=lambda: NOW, monotonic=lambda: 0)
    clock.observe({"Date": f"{_date(NOW)}, {_date(NOW - timedelta(hours=2))}"}, 0)
    assert clock.read() == NOW - timedelta(hours=2) + DATE_PRECISION


def test_the_clock_goes_on_between_responses() -> None:
    elapsed = iter([0.0, 90.0])
    clock = ServerClock(Notices(), "the server", now=lambda: NOW, monotonic=lambda: next(elapsed))
    clock.observe({"Date": _date(NOW)}, 0)
    assert clock.read() == NOW + timedelta(seconds=90) + DATE_PRECISION


class _DatedServer(SearchServer):
    """A server whose clock shows ``time()`` and that has one patient of two hours before NOW."""

    def __init__(self, time: Callable[[], datetime]) -> None:
        super().__init__([resource("Patient", "old", (NOW - timedelta(hours=2)).isoformat())])
        self.time = time

    def _reply(self, request: ReceivedRequest) -> Reply:
        answer = super()._reply(request)
        answer.headers["Date"] = _date(self.time())
        return answer


def test_a_window_is_not_complete_before_the_clock_of_the_server_says_so(tmp_path: Path) -> None:
    """The clock of this machine is 26 hours ahead."""
    server_time = NOW
    store = open_store(str(tmp_path), NO_ENCRYPTION)
    windows = WindowRange([SCHEME.window("2024-06-10"), SCHEME.window("2024-06-11")])
    with _DatedServer(lambda: server_time) as server:
        for expected in (["old"], ["new", "old"]):
            step = FetchStep(
                SearchSource(FhirClient(server.url, timeout=10)),
                store,
                run_id="run",
                now=server_time + timedelta(hours=26),
                overlap=timedelta(minutes=2),
                refresh=Refresh.MISSING,
                write_dead_letters=lambda rejected: None,
            )
            (update,) = step.run(["Patient"], windows)
            store.commit(update.manifests)
            (manifest,) = update.manifests
            assert manifest.fetched
            assert (manifest.partition_key, manifest.fetched.complete) == ("2024-06-10", False)
            assert server_time <= manifest.fetched.until < server_time + timedelta(minutes=1)
            ids = [b"new" if b'"new"' in line else b"old" for batch in store.batches(manifest.parts) for line in batch]
            assert sorted(id_.decode() for id_ in ids) == expected
            assert "clock-skew" in [notice.code for notice in manifest.fetched.notices]
            server_time += timedelta(hours=1)
            server.resources.append(resource("Patient", "new", (server_time - timedelta(minutes=1)).isoformat()))


def test_a_type_without_resources_begins_at_the_time_of_the_server(conn: Session) -> None:
    with _DatedServer(lambda: NOW) as server:
        server.resources.clear()
        source = SearchSource(FhirClient(server.url, timeout=10))
        due = find_due_windows(
            conn, source, ["Patient"], SCHEME, now=NOW + timedelta(hours=26), overlap=timedelta(minutes=2)
        )
        assert [window.key for windows in due for window in windows.windows] == ["2024-06-10"]
        assert due.new_start == datetime(2024, 6, 10, tzinfo=UTC)
