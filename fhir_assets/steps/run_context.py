"""The context of a run: its id, windows, refresh mode, trigger and replay mode."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.windows import WindowRange

TRIGGERS = ("dagster/schedule_name", "dagster/sensor_name", "dagster/backfill")
"""The tags of Dagster that name what launched a run."""

MANUAL = "manual"
"""The trigger of a run whose trigger is not known, and the actor in the audit log if a person started it."""

_COMMANDS = ("cli", "demo")


@dataclass(frozen=True, slots=True)
class RunContext:
    """The context of one run, which the steps of all layers use."""

    run_id: str
    windows: WindowRange
    refresh: Refresh
    triggered_by: str
    """A person, ``cli``, or for example ``schedule_name:incremental_load``."""
    now: datetime
    """The time at which the step began; the step uses it as the current time throughout."""
    replay: Literal["marked", "open"] | None = None
    """The dead letters that the run replays; None if the run is not a replay."""
    request_retry: Callable[[], None] = lambda: None
    """Request that Dagster's daemon retries the failed steps of the run. Runs of the command line are not retried."""

    is_being_cancelled: Callable[[], bool] = lambda: False
    """Return whether somebody has cancelled the run in Dagster."""

    @property
    def actor(self) -> str:
        """What started the run, for the audit log. A person whom a tag of the run names is not verified: ``manual``."""
        kind, _, _ = self.triggered_by.partition(":")
        known = self.triggered_by in _COMMANDS or f"dagster/{kind}" in TRIGGERS
        return self.triggered_by if known else MANUAL

    @property
    def partition_keys(self) -> list[str]:
        """The partition keys of the run's windows, in order."""
        return [window.key for window in self.windows.windows]
