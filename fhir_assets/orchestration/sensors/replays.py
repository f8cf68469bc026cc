"""The sensor ``replay_dead_letters``: replays marked dead letters, and marks outdated ones after an upgrade."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import dagster as dg

from fhir_assets.catalog import LOAD_ORDER
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration import replayable_windows
from fhir_assets.orchestration.dagster_internals import AssetGraph, UnresolvedAssetJobDefinition
from fhir_assets.orchestration.dead_runs import fail_dead_runs
from fhir_assets.orchestration.jobs import REPLAY_DEAD_LETTERS
from fhir_assets.orchestration.received_windows import select_assets, select_own_checks
from fhir_assets.orchestration.run_requests import UNFINISHED, build_run_request
from fhir_assets.orchestration.tags import REPLAY_TAG
from fhir_assets.pipeline.due_windows import group_consecutive_windows
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import replays
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.postgres.db.connections import Connection

MAX_ATTEMPTS = 3
"""The largest number of runs that are requested for the same marks; then the sensor removes the marks."""

MAX_RUNS = 10
"""The largest number of runs that one tick requests."""

MAX_OUTDATED = 100_000
"""The largest number of dead letters that one tick marks after an upgrade."""

Rulesets = Sequence[tuple[str, str, str]]
"""Resource type, stage and the ruleset in force, see ``deployment.validation.current_rulesets``."""


def build_replay_sensor(
    settings: Settings, job: UnresolvedAssetJobDefinition, warehouse: Warehouse, rulesets: Rulesets
) -> dg.SensorDefinition:
    """Return the sensor that requests runs over the windows of marked dead letters.

    A run removes the mark of each dead letter that it replays. Marks that remain after a failed or killed run are
    requested again, with the number of the attempt in the run key. The cursor holds the number of attempts
    for each range of windows that is still marked.
    """

    @dg.sensor(
        job=job,
        name=REPLAY_DEAD_LETTERS,
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Replays the dead letters that `fhir-assets dead-letters replay --no-wait` marked. After an "
        "upgrade it reports those that failed under earlier rules or views; with REPLAY_AFTER_UPGRADE it replays them.",
    )
    def replay_dead_letters(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        with warehouse.connect() as conn:
            fail_dead_runs(context.instance, conn)
        unfinished = context.instance.get_runs_count(dg.RunsFilter(job_name=job.name, statuses=UNFINISHED))
        if unfinished:
            return dg.SensorResult(skip_reason=f"{unfinished} runs of {job.name} are not finished yet")
        with warehouse.connect() as conn:
            messages = _mark_outdated(conn, settings, rulesets)
            excluded = replayable_windows.cancel_excluded(conn, settings, replays.find_requested(conn))
            marked = replays.find_requested(conn)
        if excluded:
            messages.append(
                f"{excluded} replays are cancelled, because FHIR_RESOURCE_TYPES or FHIR_PARTITION no longer include "
                "their types or windows"
            )
        attempts: dict[str, int] = json.loads(context.cursor) if context.cursor else {}
        assert context.repository_def
        plan = _plan(settings, warehouse, context.repository_def.asset_graph, marked, attempts)
        messages += plan.messages
        if not plan.requests and not messages:
            messages.append("no dead letter is marked for a replay")
        return dg.SensorResult(
            run_requests=plan.requests,
            cursor=json.dumps(plan.attempts),
            skip_reason=None if plan.requests else "; ".join(messages),
        )

    return replay_dead_letters


@dataclass(slots=True)
class _Plan:
    """The run requests of a tick, the attempts for the next cursor, and messages about cancelled replays."""

    requests: list[dg.RunRequest] = field(default_factory=list)
    attempts: dict[str, int] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


def _mark_outdated(conn: Connection, settings: Settings, rulesets: Rulesets) -> list[str]:
    """Mark dead letters that failed under earlier rules if the settings ask for it; otherwise return a message."""
    outdated = replays.find_outdated(conn, rulesets, limit=MAX_OUTDATED)
    if not outdated:
        return []
    if settings.replay_after_upgrade:
        replayable_windows.request_replay(conn, settings, Selection(ids=outdated))
        return []
    return [
        f"{len(outdated)} open dead letters failed under earlier rules or views: "
        "`fhir-assets dead-letters replay --outdated`, or REPLAY_AFTER_UPGRADE=true"
    ]


def _plan(
    settings: Settings,
    warehouse: Warehouse,
    graph: AssetGraph,
    requested: Sequence[replays.ReplayRequest],
    previous_attempts: Mapping[str, int],
) -> _Plan:
    by_key: dict[str, list[replays.ReplayRequest]] = {}
    for request in requested:
        by_key.setdefault(request.partition_key, []).append(request)
    plan = _Plan()
    for windows in group_consecutive_windows(settings.window_scheme, by_key):
        requests = [request for window in windows.windows for request in by_key[window.key]]
        types = sorted({request.resource_type for request in requests}, key=LOAD_ORDER.__getitem__)
        first, last = windows.windows[0].key, windows.windows[-1].key
        key = f"{first}..{last}@{max(request.requested_at for request in requests):%Y-%m-%dT%H:%M:%S.%f}"
        attempt = previous_attempts.get(key, 0) + 1
        if attempt > MAX_ATTEMPTS:
            with warehouse.connect() as conn:
                released = replays.cancel_requests(conn, types, [window.key for window in windows.windows])
            plan.messages.append(
                f"{released} replays of {first} to {last} are cancelled after {MAX_ATTEMPTS} failed runs"
            )
        elif len(plan.requests) < MAX_RUNS:
            plan.attempts[key] = attempt
            assets = select_assets(graph, types)
            plan.requests.append(
                build_run_request(
                    windows,
                    run_key=f"{key}/attempt {attempt}",
                    tags={REPLAY_TAG: "marked"},
                    assets=assets,
                    checks=select_own_checks(graph, assets),
                )
            )
    return plan
