"""The context of a run, read from the context of a Dagster step, and the tags of steps."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

import dagster as dg

from fhir_assets.orchestration.command_runs import is_command_run
from fhir_assets.orchestration.tags import PRIORITY_TAG, REFRESH_TAG, REPLAY_TAG, RETRY_TAG, TRIGGER_TAG, USER_TAG
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.steps.run_context import MANUAL, TRIGGERS, RunContext
from fhir_assets.windows import WindowRange, WindowScheme

_REPLAY_MODES: dict[str, Literal["marked", "open"]] = {"marked": "marked", "open": "open"}


def read_run_context(context: dg.AssetExecutionContext, scheme: WindowScheme) -> RunContext:
    """Return the context of a run of one partition or of a range of partitions."""
    tags = context.run.tags
    from_command = is_command_run(context.run)
    triggers = [tags[TRIGGER_TAG]] if from_command else []
    triggers += [f"{tag.removeprefix('dagster/')}:{tags[tag]}" for tag in TRIGGERS if tag in tags]
    windows = [scheme.window(key) for key in context.partition_keys]

    def request_retry() -> None:
        if not from_command:
            context.instance.add_run_tags(context.run.run_id, {RETRY_TAG: "true"})

    def is_being_cancelled() -> bool:
        run = context.instance.get_run_by_id(context.run.run_id)
        return run is not None and run.status is dg.DagsterRunStatus.CANCELING

    return RunContext(
        context.run.run_id,
        WindowRange(windows, from_first=windows[0] == scheme.window_at(scheme.start)),
        Refresh(tags.get(REFRESH_TAG, Refresh.WINDOW)),
        next(iter(triggers), None) or tags.get(USER_TAG) or MANUAL,
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
