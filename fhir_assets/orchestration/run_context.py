"""Facts about the current Dagster run that assets need: its id, windows, refresh mode, trigger and replay mode."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import dagster as dg

from fhir_assets.orchestration.tags import PRIORITY_TAG, REFRESH_TAG, REPLAY_TAG, RETRY_TAG, TRIGGER_TAG, USER_TAG
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.windows import WindowRange, WindowScheme

_REPLAY_MODES: dict[str, Literal["marked", "open"]] = {"marked": "marked", "open": "open"}
_TRIGGERS = ("dagster/schedule_name", "dagster/sensor_name", "dagster/backfill")


@dataclass(frozen=True, slots=True)
class RunContext:
    """The facts about one run."""

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
    """Ask Dagster's daemon to start the run again from its failed steps. A run of a command is not started again."""

    @property
    def partition_keys(self) -> list[str]:
        """The partition keys of the run's windows, in order."""
        return [window.key for window in self.windows.windows]

    @classmethod
    def from_context(cls, context: dg.AssetExecutionContext, scheme: WindowScheme) -> "RunContext":
        """Read the facts from the context of a step, for a run of one partition or of a range of partitions."""
        tags = context.run.tags
        automatic = (f"{tag.removeprefix('dagster/')}:{tags[tag]}" for tag in _TRIGGERS if tag in tags)
        windows = [scheme.window(key) for key in context.partition_keys]

        def request_retry() -> None:
            if TRIGGER_TAG not in tags:
                context.instance.add_run_tags(context.run.run_id, {RETRY_TAG: "true"})

        return cls(
            context.run.run_id,
            WindowRange(windows, from_first=windows[0] == scheme.window_at(scheme.start)),
            Refresh(tags.get(REFRESH_TAG, Refresh.WINDOW)),
            tags.get(TRIGGER_TAG) or next(automatic, None) or tags.get(USER_TAG) or "manual",
            datetime.now(UTC),
            _REPLAY_MODES.get(tags.get(REPLAY_TAG, "")),
            request_retry,
        )


def step_tags(resource_types: Sequence[str]) -> dict[str, str]:
    """Return the tags of a step that handles ``resource_types``.

    Steps of Consent start first, so that the other resource types are loaded or withheld according to the new consents
    at once.
    """
    return {PRIORITY_TAG: "1"} if "Consent" in resource_types else {}
