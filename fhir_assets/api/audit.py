"""The route that reads the audit log. Reading it is recorded in it, too."""

from datetime import datetime
from typing import Annotated, Any, get_args

import orjson
from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from fhir_assets.api.context import Context, CurrentCaller
from fhir_assets.api.problems import Problem, problem_responses
from fhir_assets.privacy.audit import Action, AuditRecord
from fhir_assets.warehouse.ops import audit_log

router = APIRouter(tags=["audit"])

ACTIONS: tuple[str, ...] = get_args(Action)


class AuditedAction(BaseModel):
    """One audited action. It contains no patient data: `subject` is a keyed hash."""

    seq: int
    at: datetime
    actor: str = Field(
        examples=["api:dashboard"],
        description="The name of an API token, the account of a command's process, or the part of the pipeline",
    )
    database_user: str | None = Field(description="The login of the session at Postgres")
    account: str | None = Field(description="The account that the process ran as, by its uid")
    claim: str | None = Field(description="The name that the caller gave, which nobody verified")
    action: str = Field(examples=["read"])
    resource_type: str | None = Field(examples=["Patient"])
    subject: str | None = Field(description="The keyed hash of the resource; `about` finds the actions on one")
    count: int
    run_id: str | None
    request_id: str | None
    detail: dict[str, Any]


class AuditPage(BaseModel):
    """Audited actions, newest first."""

    records: list[AuditedAction]
    before: int | None = Field(description="The value of `before` for the next page; null on the last one")


@router.get("/audit", response_model=AuditPage, responses=problem_responses(), summary="Audited actions")
def list_audited_actions(
    context: Context,
    caller: CurrentCaller,
    about: Annotated[
        str | None,
        Query(
            description="Only actions on this resource",
            pattern=r"^[A-Z][A-Za-z]{1,63}/[A-Za-z0-9\-.]{1,64}$",
            examples=["Patient/example"],
        ),
    ] = None,
    action: Annotated[str | None, Query(description=f"Only this action: {', '.join(ACTIONS)}", max_length=32)] = None,
    run: Annotated[str | None, Query(description="Only actions of this run", pattern=r"^[A-Za-z0-9\-:]{1,64}$")] = None,
    since: Annotated[datetime | None, Query(description="Only actions from this time on")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[int | None, Query(ge=1, lt=2**63, description="Only actions with a smaller `seq`")] = None,
) -> Response:
    """Who read, changed, exported or decrypted what, and when. `fhir-assets audit verify` shows whether the log is
    complete and unaltered.
    """
    if action is not None and action not in ACTIONS:
        raise Problem(422, f"action is one of {', '.join(ACTIONS)}")
    with context.connection() as conn:
        subject = audit_log.hash_subject(conn, *about.split("/", 1)) if about else None
        entries = audit_log.find_latest(
            conn, limit=limit, action=action, about=subject, run_id=run, since=since, before=before
        )
    context.record_audit(
        AuditRecord(
            "read", caller.actor, "AuditEvent", subject, request_id=caller.request_id, detail={"found": len(entries)}
        )
    )
    records = [
        {
            "seq": entry.seq,
            "at": entry.at,
            "actor": entry.audit_record.actor,
            "database_user": entry.writer and entry.writer.database_user,
            "account": entry.writer and entry.writer.account,
            "claim": entry.audit_record.claim,
            "action": entry.audit_record.action,
            "resource_type": entry.audit_record.resource_type,
            "subject": entry.audit_record.subject,
            "count": entry.audit_record.count,
            "run_id": entry.audit_record.run_id,
            "request_id": entry.audit_record.request_id,
            "detail": entry.audit_record.detail,
        }
        for entry in entries
    ]
    following = entries[-1].seq if len(entries) == limit else None
    return Response(orjson.dumps({"records": records, "before": following}), media_type="application/json")
