"""Records and resources that are posted: answered one by one, and in raw when the answer is given."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal
from uuid import uuid4

import orjson
from fastapi import APIRouter, Header, Response
from pydantic import BaseModel, Field

from fhir_assets.api.context import AppContext, Body, Caller, CallerOf, ContextOf, Posted
from fhir_assets.api.problems import Problem, answers
from fhir_assets.fhir.intake.schemas import load_schema
from fhir_assets.fhir.validation.issues import Issue, operation_outcome
from fhir_assets.pipeline.receive.intake import (
    IntakeValidator,
    Unreadable,
    ValidatedRecord,
    read_posted,
    read_submission,
    request_time,
)
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.warehouse.ops import idempotency

router = APIRouter(tags=["intake"])

FHIR_JSON = "application/fhir+json"

Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        max_length=256,
        description="The same key with the same body is answered as before, and nothing is done twice, for a day",
    ),
]


class IssueFound(BaseModel):
    """One finding of the validation; it never holds a value of the record."""

    severity: Literal["error", "warning"]
    rule: str = Field(examples=["required-binding"])
    path: str = Field(examples=["Patient.gender"])
    message: str


class RecordResult(BaseModel):
    """What became of one record."""

    index: int
    status: Literal["accepted", "rejected"]
    resource_type: str | None = Field(examples=["Patient"])
    id: str | None = Field(description="The id to follow: of the resource, as the look-ups know it")
    issues: list[IssueFound]


class IntakeResult(BaseModel):
    """The answer to a submission: what is accepted is in raw, and on its way into the tables."""

    request_id: str
    accepted: int
    rejected: int
    results: list[RecordResult]


_RECORDS_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["records"],
                    "additionalProperties": False,
                    "properties": {
                        "records": {
                            "type": "array",
                            "items": {
                                "anyOf": [
                                    {k: v for k, v in load_schema("patient_record").items() if not k.startswith("$")},
                                    {
                                        "type": "object",
                                        "title": "A FHIR R4 resource",
                                        "required": ["resourceType"],
                                        "properties": {"resourceType": {"type": "string"}},
                                    },
                                ]
                            },
                        }
                    },
                },
                "example": {
                    "records": [
                        {
                            "resourceType": "Patient",
                            "mrn": "MRN-0001",
                            "name": {"first": "Ada", "last": "Example"},
                            "birthDate": "1970-01-31",
                            "gender": "female",
                            "consent": {"data_sharing": True, "research": False},
                        },
                        {
                            "resourceType": "Observation",
                            "status": "final",
                            "code": {"text": "Heart rate"},
                            "subject": {"reference": "Patient/example"},
                        },
                    ]
                },
            }
        },
    }
}
_FHIR_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            FHIR_JSON: {
                "schema": {
                    "type": "object",
                    "required": ["resourceType"],
                    "properties": {"resourceType": {"type": "string"}},
                },
                "example": {"resourceType": "Patient", "id": "example", "gender": "female"},
            }
        },
    }
}
_OUTCOME = {
    "content": {
        FHIR_JSON: {
            "schema": {
                "type": "object",
                "required": ["resourceType", "issue"],
                "properties": {"resourceType": {"const": "OperationOutcome"}, "issue": {"type": "array"}},
            },
            "example": {
                "resourceType": "OperationOutcome",
                "issue": [
                    {
                        "severity": "error",
                        "code": "code-invalid",
                        "diagnostics": "not one of the codes that are allowed here",
                        "expression": ["Bundle.entry[1].resource.gender"],
                    }
                ],
            },
        }
    }
}


@router.post(
    "/api/v1/ingest",
    status_code=202,
    response_model=IntakeResult,
    responses=answers(400),
    openapi_extra=_RECORDS_BODY,
    summary="Post patient records and FHIR resources",
)
def ingest_records(context: ContextOf, caller: CallerOf, body: Body, key: Key = None) -> Response:
    """Each record is validated at once, and accepted or rejected by itself, with all that is wrong with it. What is
    accepted is in raw when the answer comes; the sensor `load_received` brings it into the tables.
    """

    def work(origin: str) -> Response:
        try:
            bodies = read_submission(body)
        except Unreadable as error:
            raise Problem(400, str(error)) from None
        require_few(context, len(bodies))
        judged = _judge(context, origin).validate_bodies(bodies)
        _receive(context, caller, origin, judged, key)
        results = [
            {
                "index": index,
                "status": "accepted" if each.accepted else "rejected",
                "resource_type": each.resource_type,
                "id": each.id,
                "issues": [
                    {"severity": i.severity, "rule": i.rule, "path": i.path, "message": i.message} for i in each.issues
                ],
            }
            for index, each in enumerate(judged)
        ]
        accepted = sum(each.accepted for each in judged)
        content = {
            "request_id": caller.request_id,
            "accepted": accepted,
            "rejected": len(judged) - accepted,
            "results": results,
        }
        return Response(orjson.dumps(content), 202, media_type="application/json")

    return once(context, caller, "/api/v1/ingest", key, body, work)


@router.post(
    "/fhir",
    responses={
        **answers(),
        200: {"description": "What is accepted, and what is not with the reasons", **_OUTCOME},
        422: {
            "description": "Nothing was accepted; a problem where the request itself does not fit",
            "content": {**answers()[422]["content"], **_OUTCOME["content"]},
        },
        400: {"description": "Not a resource, and not a Bundle that is taken", **_OUTCOME},
    },
    openapi_extra=_FHIR_BODY,
    summary="Post a FHIR resource or Bundle",
)
def ingest_fhir(context: ContextOf, caller: CallerOf, body: Body, key: Key = None) -> Response:
    """A resource, or a Bundle of type batch, transaction or collection. Of a transaction all entries are accepted or
    none is. The OperationOutcome names entries as `Bundle.entry[n]`.
    """

    def work(origin: str) -> Response:
        try:
            posted = read_posted(body)
        except Unreadable as error:
            return _outcome(400, [Issue("json", "error", "Resource", str(error))])
        require_few(context, len(posted.entries))
        judged = _judge(context, origin).validate_entries(posted.entries)
        issues = [
            replace(issue, path=f"Bundle.entry[{place}].resource" + issue.path[len(issue.path.split(".")[0]) :])
            if posted.is_bundle
            else issue
            for place, each in enumerate(judged)
            for issue in each.issues
        ]
        if not all(each.accepted for each in judged) and (posted.atomic or not any(each.accepted for each in judged)):
            return _outcome(422, issues)
        _receive(context, caller, origin, judged, key)
        return _outcome(200, issues)

    return once(context, caller, "/fhir", key, body, work)


def _outcome(status: int, issues: Sequence[Issue]) -> Response:
    return Response(orjson.dumps(operation_outcome(issues)), status, media_type=FHIR_JSON)


def _judge(context: AppContext, origin: str) -> IntakeValidator:
    return IntakeValidator(
        context.validator, context.identify, context.settings.fhir_resource_types, origin, request_time()
    )


def _receive(
    context: AppContext, caller: Caller, origin: str, judged: Sequence[ValidatedRecord], key: str | None
) -> None:
    records = [record for each in judged for record in each.records]
    if not records:
        return
    by_type = Counter(record.resource_type for record in records)
    audit_records = [
        AuditRecord("create", caller.actor, name, count=count, request_id=caller.request_id)
        for name, count in sorted(by_type.items())
    ]
    posted = Posted(records, audit_records)
    if key is None:
        context.receive_together(posted)
    else:
        # It may come again, and is known by its origin then.
        context.receive([posted], origin)


def require_few(context: AppContext, count: int) -> None:
    limit = context.settings.api_max_records
    if count > limit:
        raise Problem(413, f"more than {limit:,} records in one request (API_MAX_RECORDS)", more={"max_records": limit})


def once(
    context: AppContext, caller: Caller, path: str, key: str | None, body: bytes, work: Callable[[str], Response]
) -> Response:
    """Do the work of a request once. ``work`` gets the origin that names it: what comes again has the same."""
    if key is None:
        return work(f"api:{caller.request_id}:{uuid4().hex}")
    with context.connection() as conn:
        request = idempotency.Request.of(conn, caller.token.name, path, key, body)
        try:
            before = idempotency.begin(conn, request)
        except idempotency.AnotherBody:
            raise Problem(422, "this Idempotency-Key was used with another body: give this request its own") from None
        if before is not None:
            media_type = FHIR_JSON if path == "/fhir" else "application/json"
            return Response(before[1], before[0], headers={"Idempotent-Replayed": "true"}, media_type=media_type)
        answer = work(f"api:{request.key.hex()}:{request.body.hex()}")
        idempotency.end(conn, request, answer.status_code, bytes(answer.body))
        return answer
