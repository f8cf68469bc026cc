"""Replays of dead letters that somebody marked, and of those that an upgrade could heal."""

import json
from collections.abc import Sequence

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from fhir_assets.catalog import LOAD_ORDER
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.dead_runs import give_up_dead_runs
from fhir_assets.orchestration.received_windows import assets_of
from fhir_assets.orchestration.run_requests import UNFINISHED, run_request
from fhir_assets.orchestration.tags import REPLAY_TAG
from fhir_assets.pipeline.due_windows import group_consecutive_windows
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import replays
from fhir_assets.warehouse.ops.dead_letters import Selection

ATTEMPTS = 3
"""How many runs are asked for the same marks; then the letters are open again."""

RUNS_AT_ONCE = 10
DEAD_LETTERS_AT_ONCE = 100_000
"""How many letters one tick marks after an upgrade."""

Rulesets = Sequence[tuple[str, str, str]]
"""Resource type, stage, and what judges it now: see ``ruleset`` of dead letters."""


def replay_dead_letters_sensor(
    settings: Settings, job: UnresolvedAssetJobDefinition, warehouse: Warehouse, judges: Rulesets
) -> dg.SensorDefinition:
    """Asks for runs over the windows whose dead letters are marked.

    A mark goes when its letter is resolved or open again, so what a failed or killed run left is asked for once more,
    with its attempt in the run key; the cursor counts the attempts of what is still marked.
    """

    @dg.sensor(
        job=job,
        name="replay_dead_letters",
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Replays the dead letters that were marked by `fhir-assets dead-letters replay --no-wait`; after "
        "an upgrade says which it could heal, and with REPLAY_AFTER_UPGRADE replays them.",
    )
    def replay_dead_letters(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        with warehouse.connect() as conn:
            give_up_dead_runs(context.instance, conn)
        unfinished = context.instance.get_runs_count(dg.RunsFilter(job_name=job.name, statuses=UNFINISHED))
        if unfinished:
            return dg.SensorResult(skip_reason=f"{unfinished} runs of {job.name} are not finished yet")
        said = []
        with warehouse.connect() as conn:
            outdated = replays.outdated(conn, judges, limit=DEAD_LETTERS_AT_ONCE)
            if outdated and settings.replay_after_upgrade:
                replays.mark(conn, Selection(ids=outdated))
            elif outdated:
                said.append(
                    f"{len(outdated)} open dead letters failed under earlier rules or views: "
                    "`fhir-assets dead-letters replay --outdated`, or REPLAY_AFTER_UPGRADE=true"
                )
            marked = replays.marked(conn)
        by_key: dict[str, list[replays.Marked]] = {}
        for each in marked:
            by_key.setdefault(each.partition_key, []).append(each)
        before: dict[str, int] = json.loads(context.cursor) if context.cursor else {}
        attempts: dict[str, int] = {}
        requests: list[dg.RunRequest] = []
        assert context.repository_def
        graph = context.repository_def.asset_graph
        for windows in group_consecutive_windows(settings.window_scheme, by_key):
            there = [each for window in windows.windows for each in by_key[window.key]]
            types = sorted({each.resource_type for each in there}, key=LOAD_ORDER.__getitem__)
            first, last = windows.windows[0].key, windows.windows[-1].key
            key = f"{first}..{last}@{max(each.asked_at for each in there):%Y-%m-%dT%H:%M:%S.%f}"
            attempt = before.get(key, 0) + 1
            if attempt > ATTEMPTS:
                with warehouse.connect() as conn:
                    given_up = replays.release(conn, types, [window.key for window in windows.windows])
                said.append(f"{given_up} replays of {first} to {last} are given up after {ATTEMPTS} runs that failed")
            elif len(requests) < RUNS_AT_ONCE:
                attempts[key] = attempt
                requests.append(
                    run_request(
                        windows,
                        run_key=f"{key}/attempt {attempt}",
                        tags={REPLAY_TAG: "marked"},
                        assets=assets_of(graph, types),
                    )
                )
        if not requests and not said:
            said.append("nothing is marked for a replay")
        reason = "; ".join(said) if said and not requests else None
        return dg.SensorResult(run_requests=requests, cursor=json.dumps(attempts), skip_reason=reason)

    return replay_dead_letters
