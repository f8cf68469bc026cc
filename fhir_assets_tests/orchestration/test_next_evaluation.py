"""When the checks of tables are evaluated again: by the duration of the last evaluation, also with wrong clocks."""

from datetime import UTC, datetime, timedelta

import pytest

from fhir_assets.orchestration.sensors.table_checks import compute_next_evaluation

ENDED = datetime(2024, 1, 5, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


@pytest.mark.parametrize(
    ("duration", "pause"),
    [
        (timedelta(seconds=6), 10 * MINUTE),
        (MINUTE, 20 * MINUTE),
        (timedelta(hours=2), 30 * MINUTE),
        (-timedelta(hours=2), 10 * MINUTE),
    ],
    ids=["fast", "slow", "the clock was set forward meanwhile", "the clock was set back meanwhile"],
)
def test_the_pause_is_twenty_times_the_duration_within_limits(duration: timedelta, pause: timedelta) -> None:
    assert compute_next_evaluation(ENDED - duration, ENDED, interval=10 * MINUTE, now=ENDED + MINUTE) == ENDED + pause


def test_an_evaluation_that_ended_in_the_future_holds_up_none() -> None:
    now = ENDED - timedelta(hours=2)
    assert compute_next_evaluation(ENDED - MINUTE, ENDED, interval=10 * MINUTE, now=now) == now
