from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fhir_assets.orchestration.partitions import build_partitions
from fhir_assets.windows import EARLIEST, LATEST, Granularity, Interval, WindowRange, WindowScheme, merge_intervals

START = datetime(2024, 1, 1, tzinfo=UTC)
MOMENTS = st.datetimes(datetime(2024, 1, 1), datetime(2025, 12, 31), timezones=st.just(UTC))


def scheme(granularity: Granularity = Granularity.DAILY, *, open_start: bool = False) -> WindowScheme:
    return WindowScheme(granularity, START, open_start)


@pytest.mark.parametrize("granularity", list(Granularity))
def test_window_keys_equal_the_partition_keys_of_dagster(granularity: Granularity) -> None:
    windows = scheme(granularity)
    now = START + timedelta(days=70, hours=5)
    keys = build_partitions(windows).get_partition_keys(current_time=now)
    assert [window.key for window in windows.between(START, now)] == list(keys)


@given(moment=MOMENTS, granularity=st.sampled_from(list(Granularity)))
def test_every_moment_is_in_exactly_one_window(moment: datetime, granularity: Granularity) -> None:
    window = scheme(granularity).window_at(moment)
    assert moment in window
    assert scheme(granularity).window(window.key) == window


@given(first=MOMENTS, days=st.integers(0, 40), moment=MOMENTS)
def test_a_range_finds_the_same_window_as_the_scheme(first: datetime, days: int, moment: datetime) -> None:
    windows = WindowRange(list(scheme().between(first, first + timedelta(days=days))))
    expected = scheme().window_at(moment)
    placed = windows.find(moment)
    assert placed == (expected if expected in windows.windows else None)
    assert windows.nearest(moment) in windows.windows


def test_with_an_open_start_the_first_window_contains_all_older_moments() -> None:
    windows = scheme(open_start=True)
    old = datetime(1999, 5, 1, tzinfo=UTC)
    first = windows.window_at(old)
    assert first.key == "2024-01-01"
    assert old in first
    assert WindowRange([first]).find(old) == first
    assert windows.window("2024-01-02").start == datetime(2024, 1, 2, tzinfo=UTC)


def test_windows_are_half_open() -> None:
    window = scheme().window("2024-02-29")
    assert window.end not in window
    assert window.end - timedelta(microseconds=1) in window


@pytest.mark.parametrize("granularity", list(Granularity))
def test_the_first_and_the_last_moment_of_all_years_have_a_window(granularity: Granularity) -> None:
    ours = WindowScheme(granularity, EARLIEST, open_start=True)
    assert EARLIEST in ours.window_at(EARLIEST)
    assert ours.window_at(LATEST).end == LATEST


def test_adjacent_intervals_are_merged_and_gaps_stay() -> None:
    a, b, c, d, e = (datetime(2024, 1, day, tzinfo=UTC) for day in range(1, 6))
    assert merge_intervals([]) == []
    assert merge_intervals([Interval(None, a), Interval(a, b), Interval(b, c), Interval(d, e)]) == [
        Interval(None, c),
        Interval(d, e),
    ]
    assert merge_intervals([Interval(a, d), Interval(b, c)]) == [Interval(a, d)]
