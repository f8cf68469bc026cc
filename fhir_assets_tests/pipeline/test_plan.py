"""Plans: the interval of a window that a run fetches."""

from datetime import UTC, datetime, timedelta
from typing import Literal

import pytest

from fhir_assets.notices import Notice
from fhir_assets.pipeline.fetch.plan import PlannedFetch, covering_interval, is_complete, plan_window, split_at_gaps
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.storage.manifest import Fetch, Fetched, Manifest
from fhir_assets.windows import Granularity, Interval, WindowScheme

DAY = datetime(2024, 1, 5, tzinfo=UTC)
SCHEME = WindowScheme(Granularity.DAILY, datetime(2024, 1, 1, tzinfo=UTC), open_start=False)
WINDOW = SCHEME.window("2024-01-05")
OVERLAP = timedelta(minutes=2)


def raw(until: datetime, *, complete: bool, state: str | None = None) -> Manifest:
    return Manifest("raw", "Patient", WINDOW.key, "run", until, (), fetched=Fetched(until, complete, (), state))


def plan(
    existing: Manifest | None, now: datetime, refresh: Refresh = Refresh.MISSING, state: str | None = None
) -> PlannedFetch | None:
    return plan_window(WINDOW, existing, now=now, overlap=OVERLAP, refresh=refresh, source_state=state)


def test_a_new_window_is_fetched_from_its_start_to_now() -> None:
    assert plan(None, DAY + timedelta(hours=3)) == PlannedFetch(WINDOW, Interval(DAY, DAY + timedelta(hours=3)), None)


def test_a_window_in_the_future_is_skipped() -> None:
    assert plan(None, DAY - timedelta(hours=1), Refresh.FULL) is None


@pytest.mark.parametrize("refresh", [Refresh.MISSING, Refresh.WINDOW])
def test_the_open_window_is_extended_from_its_checkpoint_less_the_overlap(refresh: Refresh) -> None:
    existing = raw(DAY + timedelta(hours=3), complete=False)
    planned = plan(existing, DAY + timedelta(hours=4), refresh)
    start = DAY + timedelta(hours=3) - OVERLAP
    assert planned == PlannedFetch(WINDOW, Interval(start, DAY + timedelta(hours=4)), existing)


def test_an_extension_never_reaches_into_the_window_before() -> None:
    planned = plan(raw(DAY + timedelta(seconds=30), complete=False), DAY + timedelta(hours=1))
    assert planned is not None
    assert planned.interval.start == DAY


def test_a_complete_window_is_skipped_by_a_scheduled_load_and_fetched_again_on_request() -> None:
    existing = raw(WINDOW.end, complete=True)
    later = WINDOW.end + timedelta(days=3)
    assert plan(existing, later) is None
    from_start = PlannedFetch(WINDOW, Interval(DAY, WINDOW.end), None)
    assert plan(existing, later, Refresh.WINDOW) == from_start
    assert plan(existing, later, Refresh.FULL) == from_start


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize(
    ("total", "severity"), [(3, None), (2, "error")], ids=["the source counts more", "the source reports an error"]
)
def test_a_window_that_may_miss_resources_is_fetched_again_from_its_start(
    complete: bool, total: int, severity: Literal["error"] | None
) -> None:
    until = WINDOW.end if complete else DAY + timedelta(hours=3)
    notices = (Notice(severity, "incomplete", "some are missing"),) if severity else ()
    fetches = (Fetch(DAY, until, until, total, 2, 0, 0, notices), Fetch(until, until, until, 0, 0, 0, 0))
    existing = Manifest("raw", "Patient", WINDOW.key, "run", until, (), fetched=Fetched(until, complete, fetches))
    later = WINDOW.end + timedelta(days=3)
    assert plan(existing, later) == PlannedFetch(WINDOW, Interval(DAY, WINDOW.end), None)


def test_a_warning_does_not_make_a_window_doubtful() -> None:
    fetch = Fetch(DAY, WINDOW.end, WINDOW.end, 2, 2, 0, 0, (Notice("warning", "sort-ignores", "not sorted"),))
    fetched = Fetched(WINDOW.end, True, (fetch,))
    existing = Manifest("raw", "Patient", WINDOW.key, "run", WINDOW.end, (), fetched=fetched)
    assert plan(existing, WINDOW.end + timedelta(days=3)) is None


def test_a_full_refresh_fetches_the_open_window_again_from_its_start() -> None:
    planned = plan(raw(DAY + timedelta(hours=3), complete=False), DAY + timedelta(hours=4), Refresh.FULL)
    assert planned == PlannedFetch(WINDOW, Interval(DAY, DAY + timedelta(hours=4)), None)


def test_changed_files_are_read_again() -> None:
    existing = raw(WINDOW.end, complete=True, state="old")
    later = WINDOW.end + timedelta(days=3)
    assert plan(existing, later, state="old") is None
    assert plan(existing, later, state="new") == PlannedFetch(WINDOW, Interval(DAY, WINDOW.end), None)


def test_a_window_is_complete_after_the_overlap_for_late_commits() -> None:
    assert not is_complete(WINDOW, now=WINDOW.end, overlap=OVERLAP)
    assert is_complete(WINDOW, now=WINDOW.end + OVERLAP, overlap=OVERLAP)


def test_consecutive_windows_are_one_request() -> None:
    now = DAY + timedelta(days=30)
    planned = [
        p
        for key in ("2024-01-05", "2024-01-06", "2024-01-08")
        if (
            p := plan_window(
                SCHEME.window(key), None, now=now, overlap=OVERLAP, refresh=Refresh.MISSING, source_state=None
            )
        )
    ]
    runs = list(split_at_gaps(planned))
    assert [[p.window.key for p in run] for run in runs] == [["2024-01-05", "2024-01-06"], ["2024-01-08"]]
    assert covering_interval(runs[0]) == Interval(DAY, DAY + timedelta(days=2))
