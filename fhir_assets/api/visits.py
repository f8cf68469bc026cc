"""Routes that take lists of visits. A list is written to the landing zone as a CSV file.

The post loader loads the file, or Dagster if no post loader runs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal
from uuid import uuid4

import orjson
from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, Field

from fhir_assets.api.context import AppContext, Caller, Context, CurrentCaller, RawBody
from fhir_assets.api.idempotency import TASK_HEADERS, IdempotencyKey, answer_once
from fhir_assets.api.intake import require_record_limit
from fhir_assets.api.intake_models import RecordsTask, without_keywords
from fhir_assets.api.problems import FieldError, Problem, problem_responses
from fhir_assets.api.run_models import DeadLetter
from fhir_assets.errors import ConfigurationError, StoreError
from fhir_assets.fhir.intake import visits_csv
from fhir_assets.fhir.intake.schemas import load_schema
from fhir_assets.privacy.audit import Action, AuditRecord
from fhir_assets.warehouse.ops import audit_log, dead_letters, landing_files, record_posts, visits
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.ops.record_posts import ResourceKey
from fhir_assets.warehouse.ops.visits import VisitFileState, VisitPost
from fhir_assets.warehouse.postgres.db.connections import Session

router = APIRouter(tags=["visits"])

_REQUIRED_TYPES = ("Patient", "Encounter")
_MAX_LISTED = 100
_TASK_EXAMPLE = "20260131T101500.000000Z-3f9a1c2b7d604e58"


class RejectedVisit(BaseModel):
    """A record that is not a valid visit, with all of its errors."""

    index: int
    errors: list[FieldError]


class VisitsReceived(BaseModel):
    """The answer to a list of visits: the invalid records are in `rejected`, and the others are in the file."""

    records_received: int = Field(examples=[2])
    records_rejected: int = Field(examples=[0])
    csv_filename: str = Field(examples=[f"visits-{_TASK_EXAMPLE}.csv"])
    task_id: str = Field(
        description="The id of the task; its status is at /ingest/tasks/{task_id}", examples=[_TASK_EXAMPLE]
    )
    rejected: list[RejectedVisit] = Field(examples=[[]])


class Counts(BaseModel):
    """The number of records of each kind in the file."""

    patients: int = Field(description="New patients")
    updates: int = Field(description="Records with new data of a known patient")
    outdated: int = Field(description="Records with patient data that a newer file contradicts")
    visits: int = Field(description="New visits")
    repeats: int = Field(description="Known visits with the same content: nothing to load")
    conflicts: int = Field(description="Known visits with other content: dead letters")


class VisitsTask(BaseModel):
    """The progress of a posted list of visits."""

    task_id: str = Field(examples=[_TASK_EXAMPLE])
    csv_filename: str = Field(examples=[f"visits-{_TASK_EXAMPLE}.csv"])
    status: Literal["waiting", "received", "loaded", "failed"] = Field(
        description="`waiting` to be received; `received`: in raw; `loaded`: in the tables; `failed`: is retried"
    )
    records_received: int
    records_rejected: int
    counts: Counts
    dead_letters: int = Field(description="Rows of the file that became dead letters")
    dead_letter_list: list[DeadLetter] = Field(
        description=f"The latest {_MAX_LISTED} of these dead letters; /runs/{{run_id}}/deadletters lists all"
    )
    known_before: bool = Field(description="The same list was received before: nothing was loaded")
    run_id: str | None = Field(description="The Dagster run that received the file")
    error: str | None


_VISITS_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "array",
                    "minItems": 1,
                    "items": without_keywords(load_schema("visit")),
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
    responses={**problem_responses(400, 415), 202: {"headers": TASK_HEADERS}},
    openapi_extra=_VISITS_BODY,
    summary="Post visits",
)
def ingest_visits(context: Context, caller: CurrentCaller, body: RawBody, key: IdempotencyKey = None) -> Response:
    """A list of visits. The answer lists the invalid records, each with all of its errors. The other records are in a
    CSV file in the landing zone before the answer is sent. A post loader loads it within seconds; without one, Dagster
    does. If all records are invalid, the status is 422 and no file is written.
    """

    def work(_: str) -> Response:
        _require_zone(context)
        records = _parse_records(body)
        require_record_limit(context, len(records))
        all_errors = [visits_csv.find_errors(record) for record in records]
        errors = {index: record_errors for index, record_errors in enumerate(all_errors) if record_errors}
        if len(errors) == len(records):
            field_errors = [
                FieldError(path=f"/{index}{path}", message=message)
                for index, record_errors in errors.items()
                for path, message in record_errors
            ]
            raise Problem(422, "no record is a valid visit, so no file was written", errors=field_errors)
        valid = [record for index, record in enumerate(records) if index not in errors]
        post = _write_file(context, caller, valid, len(records))
        content = {
            "records_received": post.records,
            "records_rejected": post.rejected,
            "csv_filename": post.csv_filename,
            "task_id": post.task_id,
            "rejected": [
                {"index": index, "errors": [{"path": path, "message": message} for path, message in record_errors]}
                for index, record_errors in errors.items()
            ],
        }
        return Response(orjson.dumps(content), 202, media_type="application/json")

    return answer_once(context, caller, "/ingest", key, body, work)


@router.get(
    "/ingest/tasks/{task_id}",
    response_model=VisitsTask | RecordsTask,
    responses=problem_responses(404),
    summary="The progress of a post",
)
def show_task(
    context: Context,
    task_id: Annotated[str, Path(pattern=r"^[A-Za-z0-9.-]{1,64}$", examples=[_TASK_EXAMPLE])],
) -> Response:
    """For visits: the status of the file, the number of its records of each kind, and its dead letters.
    For records and resources (`/api/v1/ingest`, `/fhir`): how many are in the tables, withheld by consent, or dead
    letters.
    """
    with context.connection() as conn:
        post = visits.get_post(conn, task_id)
        if post is None:
            return _show_records_task(conn, task_id)
        state = visits.get_file_state(conn, post.zone, post.csv_filename)
        selection = Selection(origins=[state.origin] if state.origin else [])
        failed = dead_letters.find(conn, selection, limit=_MAX_LISTED) if state.dead_letters else []
    content = {
        "task_id": post.task_id,
        "csv_filename": post.csv_filename,
        "status": _status(state),
        "records_received": post.records,
        "records_rejected": post.rejected,
        "counts": {name: getattr(state.counts, name) for name in Counts.model_fields},
        "dead_letters": state.dead_letters,
        "dead_letter_list": [asdict(row) for row in failed],
        "known_before": state.known_before,
        "run_id": state.run_id,
        "error": state.error,
    }
    return Response(orjson.dumps(content, default=str), media_type="application/json")


def _show_records_task(conn: Session, task_id: str) -> Response:
    post = record_posts.get(conn, task_id)
    if post is None:
        raise Problem(404, "there is no task with this id")
    state = record_posts.get_state(conn, post)
    content = {
        "task_id": post.task_id,
        "status": "received" if state.waits else "loaded",
        "records_received": post.records,
        "records_rejected": post.rejected,
        "resources": state.resources,
        "loaded": state.loaded,
        "withheld": state.withheld,
        "dead_letters": state.dead_letters,
        "run_ids": state.run_ids,
    }
    return Response(orjson.dumps(content), media_type="application/json")


def _write_file(context: AppContext, caller: Caller, valid: list[dict[str, str]], count: int) -> VisitPost:
    """Write the valid visits of a list of ``count`` records to the landing zone, and record the post."""
    # The id begins with the time, because the landing zone is read in the order of file names.
    posted_at = context.warehouse.now()
    task_id = f"{posted_at:%Y%m%dT%H%M%S.%fZ}-{uuid4().hex[:16]}"
    name = f"visits-{task_id}.csv{context.zone.suffix}"
    post = VisitPost(task_id, context.zone.url, name, count, count - len(valid), caller.token.name)
    with context.own_connection() as conn:
        audit_records = _build_audit_records(context, conn, caller, valid)
        visits.record_post(conn, post)
        try:
            file = context.zone.put(post.csv_filename, visits_csv.write(valid))
        except (StoreError, ConfigurationError) as error:
            raise Problem(503, str(error), headers={"Retry-After": "5"}) from None
        # Not the time of the file, which this machine's clock may have given it.
        landing_files.record_posted(conn, post.zone, replace(file, written=posted_at))
        audit_log.record(conn, *audit_records)
    return post


def _build_audit_records(
    context: AppContext, conn: Session, caller: Caller, valid: Sequence[Mapping[str, str]]
) -> list[AuditRecord]:
    """Return the audit records of valid visits: for each patient, those of the Patient and of the Encounters.

    What the ledger of visits or the tables know is updated, even if the visit has nothing new.
    """
    keys = [
        (context.derive_id("Patient", visit["mrn"]), context.derive_id("Encounter", visit["visit_account_number"]))
        for visit in valid
    ]
    patient_ids = list(dict.fromkeys(patient_id for patient_id, _ in keys))
    visit_ids = list(dict.fromkeys(visit_id for _, visit_id in keys))
    known = record_posts.find_known(
        conn, [*(("Patient", key) for key in patient_ids), *(("Encounter", key) for key in visit_ids)]
    )
    known |= {("Patient", key) for key in visits.find_persons(conn, patient_ids)}
    known |= {("Encounter", key) for key in visits.find_visits(conn, visit_ids)}
    counts = Counter[tuple[str, Action, str]]()
    for patient_id, visit_id in keys:
        patient: tuple[str, Action, str] = ("Patient", _action(("Patient", patient_id), known), patient_id)
        counts[patient] = 1
        counts["Encounter", _action(("Encounter", visit_id), known), patient_id] += 1
    return [
        AuditRecord(
            action,
            caller.actor,
            name,
            audit_log.hash_subject(conn, "Patient", patient_id),
            count,
            request_id=caller.request_id,
        )
        for (name, action, patient_id), count in sorted(counts.items())
    ]


def _action(key: ResourceKey, known: Set[ResourceKey]) -> Action:
    return "update" if key in known else "create"


def _parse_records(body: bytes) -> list[Any]:
    try:
        records = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise Problem(400, "the body is not JSON: send a list of visits") from None
    if not isinstance(records, list) or not records:
        raise Problem(400, "the body is not a list of at least one visit")
    return records


def _require_zone(context: AppContext) -> None:
    settings = context.settings
    if not settings.fhir_landing_url:
        raise Problem(503, "visits are not accepted here: set FHIR_LANDING_URL to a folder or s3://bucket/prefix")
    if missing := [name for name in _REQUIRED_TYPES if name not in settings.fhir_resource_types]:
        raise Problem(503, f"visits are not accepted here: FHIR_RESOURCE_TYPES lacks {' and '.join(missing)}")


def _status(state: VisitFileState) -> str:
    if state.status == "loaded":
        return "received" if state.waiting else "loaded"
    return "failed" if state.status == "failed" else "waiting"
