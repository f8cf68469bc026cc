"""The windows that are due, with the checkpoints of a real database."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from fhir_assets.errors import ServerRefused
from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.notices import Notice
from fhir_assets.pipeline.due_windows import begin_checkpoints, find_due_windows
from fhir_assets.warehouse.ops import checkpoints
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.windows import Granularity, Interval, WindowScheme

START = datetime(2024, 1, 1, tzinfo=UTC)
SCHEME = WindowScheme(Granularity.DAILY, START, open_start=False)
OVERLAP = timedelta(minutes=2)
TYPES = ("Patient", "Observation")


class FixedSource:
    """A source with a fixed extent, state and list of offered types; it has no resources."""

    name = "fixed"
    one_pass = False
    refused: Mapping[str, ServerRefused] = MappingProxyType({})

    def __init__(
        self, extent: Interval | None = None, state: str | None = None, offered: frozenset[str] | None = None
    ) -> None:
        self._extent = extent
        self._state = state
        self._offered = offered
        self.extent_calls: list[tuple[str, ...]] = []

    def list_types(self) -> frozenset[str] | None:
        return self._offered

    def compute_state(self) -> str | None:
        return self._state

    def read_clock(self) -> None:
        pass

    def complete_until(self, intervals: Mapping[str, Interval]) -> dict[str, datetime]:
        return {}

    def find_extent(self, resource_types: Sequence[str]) -> Interval | None:
        self.extent_calls.append(tuple(resource_types))
        return self._extent

    def count(self, resource_type: str, interval: Interval) -> int | None:
        return None

    def fetch(self, resource_types: Sequence[str], interval: Interval) -> Iterator[Record | RejectedInput]:
        return iter(())

    def drain_notices(self) -> tuple[Notice, ...]:
        return ()


def due(conn: Connection, source: FixedSource, now: datetime) -> list[str]:
    """The keys of the due windows; checkpoints begin as they do in a load."""
    due_windows = find_due_windows(conn, source, TYPES, SCHEME, now=now, overlap=OVERLAP)
    begin_checkpoints(conn, due_windows)
    return [window.key for windows in due_windows for window in windows.windows]


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_finding_due_windows_writes_nothing_and_repeats_its_answer(conn: Connection) -> None:
    source = FixedSource(Interval(at("2024-03-05T08:00"), at("2024-03-06")))
    now = at("2024-03-07T12:00")
    first = find_due_windows(conn, source, TYPES, SCHEME, now=now, overlap=OVERLAP)
    assert checkpoints.get(conn, TYPES) == {}
    again = find_due_windows(conn, source, TYPES, SCHEME, now=now, overlap=OVERLAP)
    keys = [[window.key for windows in due_windows for window in windows.windows] for due_windows in (first, again)]
    assert keys == [["2024-03-05", "2024-03-06", "2024-03-07"]] * 2
    begin_checkpoints(conn, first)
    begun = checkpoints.get(conn, TYPES)
    assert {name: checkpoint.loaded_until for name, checkpoint in begun.items()} == dict.fromkeys(
        TYPES, at("2024-03-05T00:00")
    )


def test_the_first_load_begins_at_the_oldest_resource(conn: Connection) -> None:
    source = FixedSource(Interval(at("2024-03-05T08:00"), at("2024-03-06")))
    assert due(conn, source, at("2024-03-07T12:00")) == ["2024-03-05", "2024-03-06", "2024-03-07"]


def test_only_the_open_window_of_an_empty_server_is_due(conn: Connection) -> None:
    assert due(conn, FixedSource(), at("2024-03-07T12:00")) == ["2024-03-07"]


def test_after_days_of_downtime_every_window_from_the_checkpoint_to_now_is_due(conn: Connection) -> None:
    checkpoints.begin(conn, TYPES, at("2024-03-01T09:00"), source_state=None)
    source = FixedSource()
    assert due(conn, source, at("2024-03-05T00:30")) == [f"2024-03-0{day}" for day in range(1, 6)]
    assert source.extent_calls == []


def test_loaded_windows_are_not_due_again(conn: Connection) -> None:
    checkpoints.begin(conn, TYPES, at("2024-03-01T09:00"), source_state=None)
    now = at("2024-03-05T00:30")
    for day in range(1, 5):
        for name in TYPES:
            start = at(f"2024-03-0{day}")
            checkpoints.advance(conn, name, start, min(now, start + timedelta(days=1)), "run")
    assert due(conn, FixedSource(), now) == ["2024-03-04", "2024-03-05"]
    for name in TYPES:
        checkpoints.advance(conn, name, at("2024-03-05"), now, "run")
    assert due(conn, FixedSource(), now + timedelta(minutes=15)) == ["2024-03-05"]


def test_the_previous_window_is_due_until_the_overlap_for_late_commits_has_passed(conn: Connection) -> None:
    checkpoints.begin(conn, TYPES, at("2024-03-05T00:01"), source_state=None)
    assert due(conn, FixedSource(), at("2024-03-05T00:05")) == ["2024-03-04", "2024-03-05"]
    checkpoints.begin(conn, TYPES, at("2024-03-05T00:02"), source_state=None)
    assert due(conn, FixedSource(), at("2024-03-05T00:05")) == ["2024-03-05"]


def test_the_oldest_checkpoint_decides_the_first_window(conn: Connection) -> None:
    checkpoints.begin(conn, ["Patient"], at("2024-03-05T09:00"), source_state=None)
    checkpoints.begin(conn, ["Observation"], at("2024-03-03T09:00"), source_state=None)
    assert due(conn, FixedSource(), at("2024-03-05T12:00")) == ["2024-03-03", "2024-03-04", "2024-03-05"]


def test_a_newly_offered_type_is_loaded_from_its_oldest_resource(conn: Connection) -> None:
    checkpoints.begin(conn, ["Patient"], at("2024-03-05T09:00"), source_state=None)
    extent = Interval(at("2024-03-03T08:00"), at("2024-03-06"))
    assert due(conn, FixedSource(extent, offered=frozenset({"Patient"})), at("2024-03-05T12:00")) == ["2024-03-05"]
    source = FixedSource(extent, offered=frozenset(TYPES))
    assert due(conn, source, at("2024-03-05T12:00")) == ["2024-03-03", "2024-03-04", "2024-03-05"]
    assert source.extent_calls == [("Observation",)]


def test_files_are_due_only_after_they_changed(conn: Connection) -> None:
    extent = Interval(at("2024-01-05"), at("2024-01-06T00:00:01"))
    now = at("2024-03-05T12:00")
    assert due(conn, FixedSource(extent, "one"), now) == ["2024-01-05", "2024-01-06"]
    for name in TYPES:
        checkpoints.advance(conn, name, at("2024-01-05"), at("2024-01-07"), "run")
    assert due(conn, FixedSource(extent, "one"), now) == []
    assert due(conn, FixedSource(extent, "two"), now) == ["2024-01-05", "2024-01-06"]


def test_a_long_history_is_split_into_ranges_without_gap_or_overlap(conn: Connection) -> None:
    checkpoints.begin(conn, TYPES, START, source_state=None)
    now = START + timedelta(days=249, hours=5)
    ranges = find_due_windows(conn, FixedSource(), TYPES, SCHEME, now=now, overlap=OVERLAP)
    assert [len(windows.windows) for windows in ranges] == [SCHEME.per_run, SCHEME.per_run, 50]
    keys = [window.key for windows in ranges for window in windows.windows]
    assert keys == [f"{START + timedelta(days=n):%Y-%m-%d}" for n in range(250)]
