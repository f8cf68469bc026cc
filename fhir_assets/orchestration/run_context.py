"""The context of a run: its id, windows, refresh mode, trigger and replay mode."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import dagster as dg

from fhir_assets.orchestration.command_runs import is_command_run
from fhir_assets.orchestration.tags import PRIORITY_TAG, REFRESH_TAG, REPLAY_TAG, RETRY_TAG, TRIGGER_TAG, USER_TAG
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.windows import WindowRange, WindowScheme

_REPLAY_MODES: dict[str, Literal["marked", "open"]] = {"marked": "marked", "open": "open"}
_TRIGGERS = ("dagster/schedule_name", "dagster/sensor_name", "dagster/backfill")
_COMMANDS = ("cli", "demo")
_MANUAL = "manual"


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
        known = self.triggered_by in _COMMANDS or f"dagster/{kind}" in _TRIGGERS
        return self.triggered_by if known else _MANUAL

    @property
    def partition_keys(self) -> list[str]:
        """The partition keys of the run's windows, in order."""
        return [window.key for window in self.windows.windows]

    @classmethod
    def from_context(cls, context: dg.AssetExecutionContext, scheme: WindowScheme) -> "RunContext":
        """Build the context from that of a Dagster step, for a run of one partition or of a range of partitions."""
        tags = context.run.tags
        from_command = is_command_run(context.run)
        triggers = [tags[TRIGGER_TAG]] if from_command else []
        triggers += [f"{tag.removeprefix('dagster/')}:{tags[tag]}" for tag in _TRIGGERS if tag in tags]
        windows = [scheme.window(key) for key in context.partition_keys]

        def request_retry() -> None:
            if not from_command:
                context.instance.add_run_tags(context.run.run_id, {RETRY_TAG: "true"})

        def is_being_cancelled() -> bool:
            run = context.instance.get_run_by_id(context.run.run_id)
            return run is not None and run.status is dg.DagsterRunStatus.CANCELING

        return cls(
            context.run.run_id,
            WindowRange(windows, from_first=windows[0] == scheme.window_at(scheme.start)),
            Refresh(tags.get(REFRESH_TAG, Refresh.WINDOW)),
            next(iter(triggers), None) or tags.get(USER_TAG) or _MANUAL,
            datetime.now(UTC),
            _REPLAY_MODES.get(tags.get(REPLAY_TAG, "")),
            request_retry,
            is_being_cancelled,
        )


def step_tags(resource_types: Sequence[str]) -> dict[str, str]:
    """Return the tags of a step that handles ``resource_types``.

    The steps of Consent start first, so that the new consents already apply to the other resource types of the run.
    """
    return {PRIORITY_TAG: "1"} if "Consent" in resource_types else {}
