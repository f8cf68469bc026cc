"""Routes that start runs through Dagster, report on them from schema ``ops``, and replay their dead letters."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from time import monotonic
from typing import Annotated, Literal
from uuid import uuid4

import orjson
from fastapi import APIRouter, Query, Response

from fhir_assets.api.context import AppContext, Caller, Context, CurrentCaller
from fhir_assets.api.dagster import FINISHED
from fhir_assets.api.problems import problem_responses
from fhir_assets.api.resource_types import TypeName, find_resource_type
from fhir_assets.api.run_ids import InputOrRunId, RunId, list_matches, run_not_found, select_dead_letters
from fhir_assets.api.run_models import DeadLetterList, Replay, Run, RunList, Started
from fhir_assets.catalog import LOAD_ORDER
from fhir_assets.deployment.source import open_source
from fhir_assets.deployment.sources import build_binding
from fhir_assets.errors import DagsterUnavailable
from fhir_assets.orchestration import replayable_windows
from fhir_assets.orchestration.jobs import BACKFILL, INCREMENTAL_LOAD, REPLAY_DEAD_LETTERS
from fhir_assets.orchestration.received_windows import (
    AssetKeys,
    select_all_layers,
    select_assets,
    select_backfill,
    select_own_checks,
)
from fhir_assets.orchestration.run_requests import range_tags
from fhir_assets.orchestration.tags import PARTITION_TAG, REFRESH_TAG, REPLAY_TAG, USER_TAG
from fhir_assets.pipeline.correct.visit_rows import RowReplayStep
from fhir_assets.pipeline.due_windows import begin_checkpoints, find_due_windows, group_consecutive_windows
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.warehouse.ops import audit_log, dead_letters, numbers, replays, run_history
from fhir_assets.warehouse.ops.replays import ReplayRequest
from fhir_assets.windows import WindowRange

router = APIRouter(tags=["runs"])

MAX_WAIT_SECONDS = 300

MAX_REPLAYS = 10
"""The largest number of runs that a request for a replay starts."""

MAX_ROWS = 1000
"""The largest number of rows of visit files that a request for a replay receives again."""

Wait = Annotated[
    float | None,
    Query(
        ge=0,
        le=MAX_WAIT_SECONDS,
        description="Seconds to wait until the runs have ended; ignored while too many other requests wait",
    ),
]


@router.post(
    "/ingest/{resource_type}",
    status_code=202,
    response_model=Started,
    responses=problem_responses(404, 502),
    summary="Load a resource type",
)
def ingest_type(context: Context, caller: CurrentCaller, resource_type: TypeName, wait: Wait = None) -> Response:
    """Start runs of the job `incremental_load` for the windows from the type's checkpoint to now. Resources that
    were fetched before are not fetched again.
    """
    name = find_resource_type(context.settings.fhir_resource_types, resource_type)
    return _answer_started(context, _start_load(context, caller, name), wait)


@router.post(
    "/ingest/{resource_type}/backfill",
    status_code=202,
    response_model=Started,
    responses=problem_responses(404, 502),
    summary="Load a resource type, then the missing references, Patients first",
)
def backfill(context: Context, caller: CurrentCaller, resource_type: TypeName, wait: Wait = None) -> Response:
    """Start runs of the job `backfill`, which load the type. Each of them then fetches the resources to which loaded
    resources refer and that are not loaded, Patients first, and loads them. Its counts include these resources.
    """
    name = find_resource_type(context.settings.fhir_resource_types, resource_type)
    return _answer_started(context, _start_load(context, caller, name, job=BACKFILL), wait)


@router.get("/runs", response_model=RunList, responses=problem_responses(404), summary="The latest runs")
def list_runs(
    context: Context,
    resource_type: Annotated[str | None, Query(max_length=64)] = None,
    status: Annotated[Literal["RUNNING", "SUCCESS", "FAILED"] | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> Response:
    """Runs, newest first."""
    name = find_resource_type(context.settings.fhir_resource_types, resource_type) if resource_type else None
    with context.connection() as conn:
        latest = run_history.list_runs(conn, limit=limit, status=status, resource_type=name)
        run_numbers = numbers.ensure(conn, "run", [row["run_id"] for row in latest])
    return _json({"runs": [{**row, "number": run_numbers[row["run_id"]]} for row in latest]})


@router.get(
    "/runs/{run_id}",
    response_model=Run,
    responses=problem_responses(404),
    summary="One run by resource type",
)
def one_run(context: Context, run_id: RunId) -> Response:
    """The counts of a run for each resource type, with its dead letters by stage. A run that waits in Dagster's
    queue is found by its complete id only.
    """
    with context.connection() as conn:
        matches = list_matches(conn, run_id)
        types = run_history.list_types_of_run(conn, matches[0]) if len(matches) == 1 else []
        known_numbers = numbers.ensure(conn, "run", matches[:1])
    if len(matches) > 1:
        raise run_not_found(matches)
    full_run_id = matches[0] if matches else run_id
    status = None
    try:
        status = context.dagster.status(full_run_id)
    except DagsterUnavailable:
        # The counts of a run that has started are in the tables, so only an unknown run needs Dagster.
        if not matches:
            raise
    if not matches and status is None:
        raise run_not_found(matches)
    return _json(
        {
            "run_id": full_run_id,
            "number": known_numbers.get(full_run_id),
            "status": status,
            "error": _find_error(context, full_run_id, status, types),
            "dagster": context.dagster.link(full_run_id),
            "types": types,
        }
    )


def _find_error(
    context: AppContext, run_id: str, status: str | None, types: Sequence[Mapping[str, object]]
) -> str | None:
    """Return the reasons of a run's failed steps; that of Dagster if no step has recorded one."""
    reasons = dict.fromkeys(str(row["error"]) for row in types if row["error"])
    if reasons or status != "FAILURE":
        return "; ".join(reasons) or None
    with suppress(DagsterUnavailable):
        return context.dagster.find_reason(run_id)
    return None


@router.get(
    "/runs/{run_id}/deadletters",
    response_model=DeadLetterList,
    responses=problem_responses(404),
    summary="The dead letters of a run",
    operation_id="run_letters_runs__run_id__deadletters_get",
)
def list_dead_letters(
    context: Context,
    run_id: InputOrRunId,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[int | None, Query(ge=1, le=2**62, description="The last id of the previous page")] = None,
) -> Response:
    """Dead letters with their reasons, the latest failures first. The answer does not contain the resources. Parts of
    landed files that could not be read have the run that received the file, and the origin `landing:…`.
    """
    with context.connection() as conn:
        selection = select_dead_letters(conn, run_id)
        rows = [asdict(row) for row in dead_letters.find(conn, selection, before=before, limit=limit)]
    return _json({"dead_letters": rows})


@router.post(
    "/runs/{run_id}/replay",
    status_code=202,
    response_model=Replay,
    responses=problem_responses(404),
    summary="Replay a run's dead letters",
)
def replay_run(
    context: Context,
    caller: CurrentCaller,
    run_id: InputOrRunId,
    stage: Annotated[Literal["fetch", "validate", "transform", "load"] | None, Query()] = None,
) -> Response:
    """Start the runs that replay the dead letters of a run. While Dagster is not available, and after the first ten
    runs, the dead letters are marked, and the sensor `replay_dead_letters` starts runs for them. Dead letters of
    types or windows that the settings no longer include stay open. Rows of visit files (stage `fetch`) are received
    again before the answer, at most 1,000 of them, and loaded as posts are: repeat the request while `remaining` is
    not 0.
    """
    with context.connection() as conn:
        selection = replace(select_dead_letters(conn, run_id), stage=stage)
    full_run_id = selection.run_id or run_id
    audit_record = AuditRecord(
        "replay", caller.actor, run_id=full_run_id, request_id=caller.request_id, detail={"stage": stage}
    )
    rows = RowReplayStep(context.warehouse.connect, context.receiver).run(
        selection, audit_record, run_id=str(uuid4()), limit=MAX_ROWS, posted=True
    )
    with context.connection() as conn:
        scope = replayable_windows.find_replayable(conn, context.settings, selection)
        count = replays.request_replay(conn, selection, within=scope)
        audit_log.record(conn, replace(audit_record, count=count))
    return _json(
        {
            "run_id": full_run_id,
            "marked": count,
            "received": rows.received,
            "failed": rows.failed,
            "remaining": rows.remaining,
            "runs": _start_replay(context, caller, scope),
            "sensor": "replay_dead_letters",
        },
        202,
    )


def _start_load(context: AppContext, caller: Caller, name: str, *, job: str = INCREMENTAL_LOAD) -> list[str]:
    """Start the runs of a job that load the due windows of a type. Return their ids."""
    settings = context.settings
    build_binding(settings, context.warehouse, context.store).require(fetches=True)
    with context.own_connection() as conn:
        due = find_due_windows(
            conn,
            open_source(settings, warehouse=context.warehouse),
            [name],
            settings.window_scheme,
            now=datetime.now(UTC),
            overlap=settings.overlap,
        )
        begin_checkpoints(conn, due)
    if job == BACKFILL:
        selected = select_backfill(context.asset_graph, [name], settings.fhir_resource_types)
    else:
        selected = select_all_layers(context.asset_graph, [name])
    return [_launch(context, caller, job, windows, selected, {}) for windows in due]


def _start_replay(context: AppContext, caller: Caller, scope: Sequence[ReplayRequest]) -> list[str]:
    """Start the runs that replay marked dead letters. Return their ids, none if Dagster is not available."""
    types_by_key: dict[str, set[str]] = {}
    for request in scope:
        types_by_key.setdefault(request.partition_key, set()).add(request.resource_type)
    run_ids = []
    with suppress(DagsterUnavailable):
        for windows in list(group_consecutive_windows(context.settings.window_scheme, types_by_key))[:MAX_REPLAYS]:
            types = set().union(*(types_by_key[window.key] for window in windows.windows))
            assets = select_assets(context.asset_graph, sorted(types, key=LOAD_ORDER.__getitem__))
            tags = {REPLAY_TAG: "marked"}
            run_ids.append(_launch(context, caller, REPLAY_DEAD_LETTERS, windows, assets, tags))
    return run_ids


def _launch(
    context: AppContext,
    caller: Caller,
    job: str,
    windows: WindowRange,
    selected: AssetKeys,
    tags: Mapping[str, str],
) -> str:
    """Start a run of a job over windows, with the selected assets and their own checks. Return its id."""
    keys = [window.key for window in windows.windows]
    partition_tags = {PARTITION_TAG: keys[0]} if len(keys) == 1 else range_tags(windows)
    return context.dagster.launch(
        job,
        assets=[key.path for key in selected],
        checks=[(check.asset_key.path, check.name) for check in select_own_checks(context.asset_graph, selected)],
        tags={REFRESH_TAG: Refresh.MISSING.value, USER_TAG: caller.actor, **partition_tags, **tags},
    )


def _answer_started(context: AppContext, run_ids: Sequence[str], wait: float | None) -> Response:
    """Wait for the runs at most ``wait`` seconds, and answer with their statuses, and the counts of ended runs."""
    deadline = monotonic() + (wait or 0)
    statuses: dict[str, str | None] = {}
    # A waiting request occupies a thread, so only MAX_WAITING_REQUESTS may wait.
    if wait and context.wait_slots.acquire(blocking=False):
        try:
            for run_id in run_ids:
                statuses[run_id] = context.dagster.wait(run_id, max(0.0, deadline - monotonic()))
        finally:
            context.wait_slots.release()
    started = []
    for run_id in run_ids:
        status = statuses.get(run_id)
        counts = None
        if status in FINISHED:
            with context.connection() as conn:
                counts = run_history.list_types_of_run(conn, run_id)
        started.append(
            {
                "run_id": run_id,
                "status": status,
                "summary": f"/runs/{run_id}",
                "dagster": context.dagster.link(run_id),
                "counts": counts,
            }
        )
    return _json({"run_id": run_ids[0] if run_ids else None, "runs": started}, 202)


def _json(content: object, status: int = 200) -> Response:
    return Response(orjson.dumps(content, default=str), status, media_type="application/json")
