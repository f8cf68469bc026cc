"""Visits that are posted: a list becomes a CSV file of the landing zone, from where Dagster takes it on."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import uuid4

import orjson
from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, Field

from fhir_assets.api.context import AppContext, Body, Caller, CallerOf, ContextOf
from fhir_assets.api.intake import Key, once, require_few
from fhir_assets.api.problems import FieldError, Problem, answers
from fhir_assets.errors import ConfigurationError, StoreError
from fhir_assets.fhir.intake import visits_csv
from fhir_assets.fhir.intake.schemas import load_schema
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.warehouse.ops import visits
from fhir_assets.warehouse.ops.visits import FileState, Post

router = APIRouter(tags=["visits"])

_NEEDED = ("Patient", "Encounter")
_TASK = "20260131T101500.000000Z-3f9a1c2b7d604e58"


class RejectedVisit(BaseModel):
    """A record that was not taken, and all that is wrong with it."""

    index: int
    errors: list[FieldError]


class VisitsReceived(BaseModel):
    """The answer to a list of visits: those that are no visits are in ``rejected``, all others in the file."""

    records_received: int = Field(examples=[2])
    records_rejected: int = Field(examples=[0])
    csv_filename: str = Field(examples=[f"visits-{_TASK}.csv"])
    task_id: str = Field(description="The task to follow at /ingest/tasks/{task_id}", examples=[_TASK])
    rejected: list[RejectedVisit] = Field(examples=[[]])


class Counts(BaseModel):
    """What the file brought."""

    patients: int = Field(description="Persons that were not known before")
    updates: int = Field(description="Records that say something new of a known person")
    outdated: int = Field(description="Records that say of a person what a newer file contradicts")
    visits: int = Field(description="Visits that were not known before")
    repeats: int = Field(description="Visits that were known, with the same content: nothing to do")
    conflicts: int = Field(description="Visits that were known with other content: dead letters")


class VisitsTask(BaseModel):
    """How far a posted list is."""

    task_id: str = Field(examples=[_TASK])
    csv_filename: str = Field(examples=[f"visits-{_TASK}.csv"])
    status: Literal["waiting", "received", "loaded", "failed"] = Field(
        description="`waiting` for Dagster; `received`: in raw; `loaded`: in the tables; `failed`: tried again later"
    )
    records_received: int
    records_rejected: int
    counts: Counts
    dead_letters: int = Field(description="Rows of the file that became dead letters")
    known_before: bool = Field(description="The same list had been received before: nothing was done")
    run_id: str | None = Field(description="The Dagster run that received it")
    error: str | None


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "array",
                    "minItems": 1,
                    "items": {k: v for k, v in load_schema("visit").items() if not k.startswith("$")},
                },
                "example": [
                    {
                        "mrn": "MRN-0001",
                        "first_name": "Ada",
                        "last_name": "Example",
                        "birth_date": "1970-01-31",
                        "visit_account_number": "V-1001",
                        "visit_date": "2026-01-30",
                        "reason": "Annual check",
                    }
                ],
            }
        },
    }
}


@router.post(
    "/ingest",
    status_code=202,
    response_model=VisitsReceived,
    responses=answers(400),
    openapi_extra=_BODY,
    summary="Post visits",
)
def ingest_visits(context: ContextOf, caller: CallerOf, body: Body, key: Key = None) -> Response:
    """A list of visits. Records that are no visits are rejected in the answer with all that is wrong with each, and
    the others are taken: they are a CSV file in the landing zone when the answer comes, which Dagster loads. If none
    is a visit the answer is 422.
    """

    def work(_: str) -> Response:
        _require_zone(context)
        records = _listed(body)
        require_few(context, len(records))
        wrong = [(index, found) for index, record in enumerate(records) if (found := visits_csv.find_errors(record))]
        if len(wrong) == len(records):
            errors = [
                FieldError(path=f"/{index}{path}", message=said) for index, found in wrong for path, said in found
            ]
            raise Problem(422, "none of the records is a visit, so nothing was taken", errors=errors)
        bad = {index for index, _ in wrong}
        good = [record for index, record in enumerate(records) if index not in bad]
        post = _put(context, caller, good, len(records))
        content = {
            "records_received": post.records,
            "records_rejected": post.rejected,
            "csv_filename": post.csv_filename,
            "task_id": post.task_id,
            "rejected": [
                {"index": index, "errors": [{"path": path, "message": said} for path, said in found]}
                for index, found in wrong
            ],
        }
        return Response(orjson.dumps(content), 202, media_type="application/json")

    return once(context, caller, "/ingest", key, body, work)


@router.get(
    "/ingest/tasks/{task_id}", response_model=VisitsTask, responses=answers(404), summary="How far a posted list is"
)
def visits_task(
    context: ContextOf,
    task_id: Annotated[str, Path(pattern=r"^[A-Za-z0-9.-]{1,64}$", examples=[_TASK])],
) -> Response:
    """What became of the file: whether it is in the tables, and what it brought."""
    with context.connection() as conn:
        post = visits.post(conn, task_id)
        if post is None:
            raise Problem(404, "there is no such task")
        state = visits.file_state(conn, post.zone, post.csv_filename)
    content = {
        "task_id": post.task_id,
        "csv_filename": post.csv_filename,
        "status": _status(state),
        "records_received": post.records,
        "records_rejected": post.rejected,
        "counts": {name: getattr(state.brought, name) for name in Counts.model_fields},
        "dead_letters": state.dead_letters,
        "known_before": state.known_before,
        "run_id": state.run_id,
        "error": state.error,
    }
    return Response(orjson.dumps(content), media_type="application/json")


def _put(context: AppContext, caller: Caller, good: list[dict[str, str]], count: int) -> Post:
    # The time leads, so that files of one second are taken in the order in which they were posted.
    task_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{uuid4().hex[:16]}"
    post = Post(task_id, context.zone.url, f"visits-{task_id}.csv", count, count - len(good), caller.token.name)
    audit_record = AuditRecord("create", caller.actor, "Encounter", count=len(good), request_id=caller.request_id)
    with context.connection() as conn:
        visits.posted(conn, post)
        try:
            context.zone.put(post.csv_filename, visits_csv.write(good))
        except (StoreError, ConfigurationError) as error:
            raise Problem(503, str(error), headers={"Retry-After": "5"}) from None
    context.note(audit_record)
    return post


def _listed(body: bytes) -> list[Any]:
    try:
        records = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise Problem(400, "not JSON: a list of visits is taken") from None
    if not isinstance(records, list) or not records:
        raise Problem(400, "a list of one visit or more is taken")
    return records


def _require_zone(context: AppContext) -> None:
    settings = context.settings
    if not settings.fhir_landing_url:
        raise Problem(503, "visits are not taken here: FHIR_LANDING_URL is not set to a folder or s3://bucket/prefix")
    if missing := [name for name in _NEEDED if name not in settings.fhir_resource_types]:
        raise Problem(503, f"visits are not taken here: FHIR_RESOURCE_TYPES lacks {' and '.join(missing)}")


def _status(state: FileState) -> str:
    if state.status == "loaded":
        return "received" if state.waiting else "loaded"
    return "failed" if state.status == "failed" else "waiting"
