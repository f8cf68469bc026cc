"""Steps of the wall clock, as the difference from the monotonic clock."""

from fhir_assets.orchestration.instance.clock_watch import ClockWatch


class Clocks:
    """A wall clock and a monotonic clock."""

    def __init__(self) -> None:
        self.wall = 1_700_000_000.0
        self.monotonic = 50.0

    def pass_seconds(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


def test_time_that_passes_is_no_step_and_each_step_is_seen_once() -> None:
    clocks = Clocks()
    watch = ClockWatch(lambda: clocks.wall, lambda: clocks.monotonic)
    steps = []
    for set_by in (0, -7200, 0, 7200, -30, 0):
        clocks.pass_seconds(5)
        clocks.wall += set_by
        steps.append(watch.measure_step())
    assert steps == [0, -7200, 0, 7200, -30, 0]
