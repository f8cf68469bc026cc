"""Routes that take patient records and FHIR resources. Accepted records are stored in ``raw`` before the answer."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import orjson
from fastapi import APIRouter, Response

from fhir_assets.api.context import AppContext, Caller, Context, CurrentCaller, RawBody
from fhir_assets.api.idempotency import TASK_HEADERS, IdempotencyKey, answer_once
from fhir_assets.api.intake_models import FHIR_BODY, FHIR_JSON, OPERATION_OUTCOME, RECORDS_BODY, IntakeResult
from fhir_assets.api.problems import Problem, problem_responses
from fhir_assets.api.submissions import Submission, build_task_id, find_subjects
from fhir_assets.fhir.validation.issues import UNLISTED, Issue, build_operation_outcome
from fhir_assets.pipeline.receive.intake import (
    IntakeValidator,
    UnreadableBody,
    ValidatedRecord,
    read_posted_body,
    read_submission,
)

router = APIRouter(tags=["intake"])

MAX_ISSUES_OF_ANSWER = 5_000
"""About how many issues an answer lists. After them, each record has its first error and its first warning."""


@router.post(
    "/api/v1/ingest",
    status_code=202,
    response_model=IntakeResult,
    responses={
        **problem_responses(400, 415),
        202: {"headers": TASK_HEADERS},
        422: {
            "description": "Every record was rejected; a problem document if the request itself is not valid",
            "content": {
                **problem_responses()[422]["content"],
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/IntakeResult"},
                    "example": {
                        "request_id": "4a9d0c3c1b6f1f7d11",
                        "task_id": None,
                        "accepted": 0,
                        "rejected": 1,
                        "results": [
                            {
                                "index": 0,
                                "status": "rejected",
                                "resource_type": "Patient",
                                "id": None,
                                "issues": [
                                    {
                                        "severity": "error",
                                        "rule": "required-binding",
                                        "path": "Patient.gender",
                                        "message": "is not a code of administrative-gender",
                                    }
                                ],
                            }
                        ],
                    },
                },
            },
        },
    },
    openapi_extra=RECORDS_BODY,
    summary="Post patient records and FHIR resources",
)
def ingest_records(context: Context, caller: CurrentCaller, body: RawBody, key: IdempotencyKey = None) -> Response:
    """Each record is validated immediately and accepted or rejected independently of the others; the answer lists the
    issues of each record. If every record is rejected, the status is 422.

    Accepted records are stored in `raw` before the answer. A post loader loads them into the tables within seconds;
    without one, the sensor `load_received` starts the run that loads them. `/ingest/tasks/{task_id}` says when they are
    loaded, and how many of them consent withholds.
    """

    def work(origin: str) -> Response:
        try:
            bodies = read_submission(body)
        except UnreadableBody as error:
            raise Problem(400, str(error)) from None
        require_record_limit(context, len(bodies))
        validated = _build_validator(context, origin).validate_bodies(bodies)
        task_id = _receive(context, caller, origin, validated, key)
        results = [
            {
                "index": index,
                "status": "accepted" if record.accepted else "rejected",
                "resource_type": record.resource_type,
                "id": record.id,
                "issues": [
                    {"severity": issue.severity, "rule": issue.rule, "path": issue.path, "message": issue.message}
                    for issue in issues
                ],
            }
            for index, (record, issues) in enumerate(zip(validated, _list_issues(validated), strict=True))
        ]
        accepted = sum(record.accepted for record in validated)
        content = {
            "request_id": caller.request_id,
            "task_id": task_id,
            "accepted": accepted,
            "rejected": len(validated) - accepted,
            "results": results,
        }
        status = 422 if validated and not accepted else 202
        return Response(orjson.dumps(content), status, media_type="application/json")

    return answer_once(context, caller, "/api/v1/ingest", key, body, work)


@router.post(
    "/fhir",
    responses={
        **problem_responses(415),
        200: {
            "description": "The accepted resources are stored; the issues of the others",
            "headers": TASK_HEADERS,
            **OPERATION_OUTCOME,
        },
        422: {
            "description": "Nothing was accepted; a problem document if the request itself is not valid",
            "content": {**problem_responses()[422]["content"], **OPERATION_OUTCOME["content"]},
        },
        400: {
            "description": "Neither a resource nor a container, or a container with a part that cannot be received",
            **OPERATION_OUTCOME,
        },
    },
    openapi_extra=FHIR_BODY,
    summary="Post a FHIR resource or Bundle",
)
def ingest_fhir(context: Context, caller: CurrentCaller, body: RawBody, key: IdempotencyKey = None) -> Response:
    """A resource, a Bundle of any type, Parameters, or an array of these: all resources in them are received. A
    transaction is accepted only if all of its entries are valid. The OperationOutcome names entries as
    `Bundle.entry[n]`. Its id, which is also the header `X-Task-Id`, is that of the task: `/ingest/tasks/{task_id}` says
    when the accepted resources are loaded.
    """

    def work(origin: str) -> Response:
        try:
            posted = read_posted_body(body)
        except UnreadableBody as error:
            return _outcome(400, [Issue("json", "error", "Resource", str(error))])
        require_record_limit(context, len(posted.bodies))
        validated = _build_validator(context, origin).validate_bodies(posted.bodies)
        issues = [
            _locate_in_container(issue, location)
            for location, issues in zip(posted.locations, _list_issues(validated), strict=True)
            for issue in issues
        ]
        accepted = [record.accepted for record in validated]
        if not all(accepted) and (posted.atomic or not any(accepted)):
            return _outcome(422, issues)
        task_id = _receive(context, caller, origin, validated, key)
        return _outcome(200, issues, task_id)

    return answer_once(context, caller, "/fhir", key, body, work, media_type=FHIR_JSON)


def _list_issues(validated: Sequence[ValidatedRecord]) -> Iterator[tuple[Issue, ...]]:
    """Yield the issues of each record. After MAX_ISSUES_OF_ANSWER each record has its first error and warning only."""
    left = MAX_ISSUES_OF_ANSWER
    for record in validated:
        issues = record.issues
        if len(issues) > max(left, 1):
            first = {issue.severity: issue for issue in reversed(issues)}
            worst = min(first)  # "error" is before "warning".
            issues = (*first.values(), Issue(UNLISTED, worst, "Resource", "the others are not listed in this answer"))
        left -= len(issues)
        yield issues


def require_record_limit(context: AppContext, count: int) -> None:
    """Raise Problem if a request has more records than API_MAX_RECORDS."""
    limit = context.settings.api_max_records
    if count > limit:
        raise Problem(
            413,
            f"the request has more than {limit:,} records (API_MAX_RECORDS): send fewer records in a request",
            more={"max_records": limit},
        )


def _locate_in_container(issue: Issue, location: str) -> Issue:
    """Return the issue with the location of its resource in a container in place of the resource type."""
    if not location:
        return issue
    resource_type = issue.path.split(".")[0]
    path = location if location.startswith("[") and "." not in location else f"{location}.resource"
    return replace(issue, path=path + issue.path[len(resource_type) :])


def _outcome(status: int, issues: Sequence[Issue], task_id: str | None = None) -> Response:
    """Return an OperationOutcome; its id is that of the task of the accepted resources."""
    outcome = build_operation_outcome(issues)
    if task_id:
        outcome["id"] = task_id
    return Response(orjson.dumps(outcome), status, media_type=FHIR_JSON)


def _build_validator(context: AppContext, origin: str) -> IntakeValidator:
    return IntakeValidator(
        context.validator, context.derive_id, context.settings.fhir_resource_types, origin, context.warehouse.now()
    )


def _receive(
    context: AppContext, caller: Caller, origin: str, validated: Sequence[ValidatedRecord], key: str | None
) -> str | None:
    """Store the accepted records in ``raw``, and return the id of the task, None if there are none."""
    records = [record for validated_record in validated for record in validated_record.records]
    if not records:
        return None
    submission = Submission(
        task_id=build_task_id(origin),
        records=records,
        subjects=[find_subjects(record, context.reference_bases) for record in records],
        count=len(validated),
        rejected=sum(not validated_record.accepted for validated_record in validated),
        actor=caller.actor,
        token=caller.token.name,
        request_id=caller.request_id,
    )
    if key is None:
        context.receive_grouped(submission)
    else:
        # A repeated request is recognized by its origin, which a group of submissions would hide.
        context.receive([submission], origin)
    return submission.task_id
