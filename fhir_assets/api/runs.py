"""Runs: started through Dagster, and what became of them as the tables of ops know it."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from time import monotonic
from typing import Annotated, Literal

import orjson
from fastapi import APIRouter, Path, Query, Response

from fhir_assets.api.context import AppContext, Caller, CallerOf, ContextOf
from fhir_assets.api.dagster import FINISHED
from fhir_assets.api.problems import Problem, answers
from fhir_assets.api.run_models import Exported, Letters, Replay, Run, RunList, Started
from fhir_assets.catalog import BY_KEY, BY_NAME, CATALOG
from fhir_assets.deployment.source import open_source
from fhir_assets.deployment.store import blobs_at
from fhir_assets.deployment.views import build_views
from fhir_assets.errors import DagsterUnavailable
from fhir_assets.orchestration.jobs import FETCH_MISSING_REFERENCES, INCREMENTAL_LOAD
from fhir_assets.orchestration.received_windows import assets_of
from fhir_assets.orchestration.run_requests import range_tags
from fhir_assets.orchestration.tags import REFRESH_TAG, USER_TAG
from fhir_assets.pipeline.due_windows import begin_checkpoints, find_due_windows
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.warehouse.exports.export import Export, folder_of_run, windows_of_run
from fhir_assets.warehouse.ops import audit_log, dead_letters, replays, run_history, runs
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.tables import view_tables

router = APIRouter(tags=["runs"])

LONGEST_WAIT = 300

TypeName = Annotated[
    str,
    Path(
        description="A resource type: `Observation`, `observation`, or its plural `observations`",
        examples=["observations"],
        max_length=64,
    ),
]
RunId = Annotated[str, Path(description="A run's id; its first characters do", pattern=r"^[A-Za-z0-9\-]{1,64}$")]
Wait = Annotated[
    float | None,
    Query(
        ge=0,
        le=LONGEST_WAIT,
        description="Wait so many seconds for the runs to end. Where many wait already, the answer comes at once",
    ),
]


@router.post(
    "/ingest/{resource_type}",
    status_code=202,
    response_model=Started,
    responses=answers(404, 502),
    summary="Load a type",
)
def ingest_type(context: ContextOf, caller: CallerOf, resource_type: TypeName, wait: Wait = None) -> Response:
    """Load what the windows from the type's checkpoint to now lack, in runs of the job `incremental_load`."""
    return _started(context, _load(context, caller, _type(context, resource_type)), wait)


@router.post(
    "/ingest/{resource_type}/backfill",
    status_code=202,
    response_model=Started,
    responses=answers(404, 502),
    summary="Load what a type refers to, Patients first, then the type",
)
def backfill(context: ContextOf, caller: CallerOf, resource_type: TypeName, wait: Wait = None) -> Response:
    """First a run of `fetch_missing_references`: what loaded resources refer to and the tables lack, Patients first.
    Then the runs that load the type.
    """
    name = _type(context, resource_type)
    # Of runs that wait in Dagster's queue the one of greater priority begins first.
    first = context.dagster.launch(FETCH_MISSING_REFERENCES, tags={USER_TAG: caller.actor, "dagster/priority": "10"})
    return _started(context, [first, *_load(context, caller, name)], wait)


@router.get("/runs", response_model=RunList, responses=answers(404), summary="The latest runs")
def list_runs(
    context: ContextOf,
    resource_type: Annotated[str | None, Query(max_length=64)] = None,
    status: Annotated[Literal["RUNNING", "SUCCESS", "FAILED"] | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> Response:
    """The newest first."""
    name = _type(context, resource_type) if resource_type else None
    with context.connection() as conn:
        found = run_history.latest(conn, limit=limit, status=status, resource_type=name)
    return _json({"runs": found})


@router.get("/runs/{run_id}", response_model=Run, responses=answers(404), summary="A run by resource type")
def one_run(context: ContextOf, run_id: RunId) -> Response:
    """What it fetched, validated and loaded, and its dead letters by stage. A run that waits in Dagster's queue is
    known by its whole id.
    """
    with context.connection() as conn:
        begun = runs.beginning_with(conn, run_id)
        types = run_history.by_type(conn, begun[0]) if len(begun) == 1 else []
    whole = begun[0] if len(begun) == 1 else run_id
    status = None
    try:
        status = None if len(begun) > 1 else context.dagster.status(whole)
    except DagsterUnavailable:
        # What it did is in the tables all the same.
        if not begun:
            raise
    if len(begun) > 1 or (not begun and status is None):
        raise _unknown(begun)
    return _json({"run_id": whole, "status": status, "dagster": context.dagster.link(whole), "types": types})


@router.get(
    "/runs/{run_id}/deadletters",
    response_model=Letters,
    responses=answers(404),
    summary="What could not go on in a run",
)
def run_letters(
    context: ContextOf,
    run_id: RunId,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[int | None, Query(ge=1, le=2**62, description="The last id of the page before")] = None,
) -> Response:
    """Those that failed last first, each with its reason. The resources themselves are not given here."""
    with context.connection() as conn:
        chosen = Selection(run_id=_whole_run(conn, run_id))
        found = [asdict(each) for each in dead_letters.find(conn, chosen, before=before, limit=limit)]
    return _json({"dead_letters": found})


@router.post(
    "/runs/{run_id}/replay",
    status_code=202,
    response_model=Replay,
    responses=answers(404),
    summary="Replay a run's dead letters",
)
def replay_run(
    context: ContextOf,
    caller: CallerOf,
    run_id: RunId,
    stage: Annotated[Literal["validate", "transform", "load"] | None, Query()] = None,
) -> Response:
    """They are marked; the sensor `replay_dead_letters` starts the runs that judge them again."""
    with context.connection() as conn:
        whole = _whole_run(conn, run_id)
        count = replays.mark(conn, Selection(run_id=whole, stage=stage))
        audit_record = AuditRecord(
            "replay", caller.actor, None, None, count, whole, caller.request_id, {"stage": stage}
        )
        audit_log.record(conn, audit_record)
    return _json({"run_id": whole, "marked": count, "sensor": "replay_dead_letters"}, 202)


@router.post(
    "/export/{resource_type}",
    response_model=Exported,
    responses=answers(404),
    summary="Write files of a type",
)
def export_type(
    context: ContextOf,
    caller: CallerOf,
    resource_type: TypeName,
    run_id: Annotated[
        str | None, Query(pattern=r"^[A-Za-z0-9\-]{1,64}$", description="Only that run's windows")
    ] = None,
    include_raw: Annotated[bool, Query(description="Resources as received")] = False,
    include_normalized: Annotated[bool, Query(description="The tables, as Parquet")] = True,
) -> Response:
    """Into FHIR_EXPORT_URL: the valid resources, and what else is asked for. Whom consent withholds is not in them."""
    name = _type(context, resource_type)
    if not context.settings.fhir_export_url:
        raise Problem(409, "FHIR_EXPORT_URL is not set: give a folder or s3://bucket/prefix where exports go")
    views = [view for view in build_views(context.settings).views if view.resource_type == name]
    target = blobs_at(context.settings, context.settings.fhir_export_url)
    with context.connection() as conn:
        keys: list[str] | None = None
        whole = ""
        folder = f"exports/{name}_{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        if run_id:
            whole, by_type = windows_of_run(conn, _whole_run(conn, run_id))
            keys, folder = by_type.get(name, []), folder_of_run(whole, datetime.now(UTC))
        view_tables.ensure_tables(conn, views)
        conn.commit()
        withholding = context.settings.gate.closed
        if include_raw and withholding:
            raise Problem(409, "CONSENT_POLICY is on, and raw holds what consent withholds too: leave include_raw out")
        export = Export(
            conn,
            context.store,
            target,
            folder,
            run_id=whole,
            actor=caller.actor,
            withholding=withholding,
            manifest=f"{name}.manifest.json",
        )
        of_type = export.of(name, keys)
        files = [of_type.valid()]
        if include_raw:
            files.append(of_type.raw())
        if include_normalized:
            files += [of_type.table(view, "parquet") for view in views]
        place = export.finish()
    return _json({"folder": place, "files": [asdict(file) for file in files]})


def _load(context: AppContext, caller: Caller, name: str) -> list[str]:
    settings = context.settings
    with context.connection() as conn:
        due = find_due_windows(
            conn,
            open_source(settings, warehouse=context.warehouse),
            [name],
            settings.window_scheme,
            now=datetime.now(UTC),
            overlap=settings.overlap,
        )
        begin_checkpoints(conn, due)
    assets = [["raw", BY_NAME[name].key], *(list(key.path) for key in assets_of(context.asset_graph, [name]))]
    started = []
    for windows in due:
        keys = [window.key for window in windows.windows]
        place = {"dagster/partition": keys[0]} if len(keys) == 1 else range_tags(windows)
        tags = {REFRESH_TAG: Refresh.MISSING.value, USER_TAG: caller.actor, **place}
        started.append(context.dagster.launch(INCREMENTAL_LOAD, assets=assets, tags=tags))
    return started


def _started(context: AppContext, run_ids: list[str], wait: float | None) -> Response:
    until = monotonic() + (wait or 0)
    statuses: dict[str, str | None] = {}
    # Who waits keeps a thread, so only some may.
    if wait and context.waiting.acquire(blocking=False):
        try:
            statuses = {run_id: context.dagster.wait(run_id, max(0.0, until - monotonic())) for run_id in run_ids}
        finally:
            context.waiting.release()
    found = []
    for run_id in run_ids:
        status = statuses.get(run_id)
        counts = None
        if status in FINISHED:
            with context.connection() as conn:
                counts = run_history.by_type(conn, run_id)
        found.append(
            {
                "run_id": run_id,
                "status": status,
                "summary": f"/runs/{run_id}",
                "dagster": context.dagster.link(run_id),
                "counts": counts,
            }
        )
    return _json({"run_id": run_ids[0] if run_ids else None, "runs": found}, 202)


def _type(context: AppContext, given: str) -> str:
    """The resource type that a path names. Raises Problem."""
    plurals = {_plural(each.key): each.name for each in CATALOG}
    names = {each.lower(): each for each in BY_NAME}
    key = given.lower().replace("-", "_")
    name = names.get(given.lower()) or plurals.get(key) or (BY_KEY[key].name if key in BY_KEY else None)
    name = name or {_plural(lower): name for lower, name in names.items()}.get(key)
    if name is None or name not in context.settings.fhir_resource_types:
        raise Problem(
            404, "this resource type is not loaded here", more={"types": list(context.settings.fhir_resource_types)}
        )
    return name


def _plural(key: str) -> str:
    if key.endswith("y"):
        return f"{key[:-1]}ies"
    return f"{key}es" if key.endswith("s") else f"{key}s"


def _whole_run(conn: Connection, prefix: str) -> str:
    found = runs.beginning_with(conn, prefix)
    if len(found) != 1:
        raise _unknown(found)
    return found[0]


def _unknown(found: Sequence[str]) -> Problem:
    return Problem(404, "several runs begin so: give more of the id" if found else "there is no such run")


def _json(content: object, status: int = 200) -> Response:
    return Response(orjson.dumps(content, default=str), status, media_type="application/json")
