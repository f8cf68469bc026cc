"""Look-ups of patients: decrypted for those who may read, consent-gated, every one on record."""

from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import urlencode

import orjson
from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, Field

from fhir_assets.api.context import AppContext, Caller, CallerOf, ContextOf
from fhir_assets.api.problems import Problem, answers
from fhir_assets.privacy.audit import Action, AuditRecord
from fhir_assets.warehouse.ops import audit_log
from fhir_assets.warehouse.postgres.db.connections import Session, cipher_of
from fhir_assets.warehouse.postgres.queries import patient_directory, patients
from fhir_assets.warehouse.postgres.queries.patient_directory import Search
from fhir_assets.warehouse.postgres.queries.patients import Absence

router = APIRouter(tags=["patients"])

ID = r"^[A-Za-z0-9\-.]{1,64}$"
LAST_PAGE = 10_000_000

PatientId = Annotated[str, Path(pattern=ID, examples=["example"])]
Known = Annotated[str | None, Query(min_length=1, max_length=256, pattern=r"^[^\x00]*$")]


class Person(BaseModel):
    """Who somebody is."""

    first_name: str | None = None
    last_name: str | None = None
    birth_date: str | None = Field(None, examples=["1970-01-31"])
    gender: str | None = None
    deceased: bool | None = None


class Visit(BaseModel):
    """One encounter."""

    id: str
    visit_account_number: str | None = None
    visit_date: str | None = None
    status: str | None = None
    reason: str | None = None


class Patient(BaseModel):
    """A patient with all visits, the latest first."""

    id: str
    mrn: str | None = None
    person: Person
    visits: list[Visit]


class PatientPage(BaseModel):
    """One page, in the order of ids."""

    total: int = Field(description="How many there are; may be half a minute old where nothing is searched for")
    page: int
    page_size: int
    patients: list[Patient]
    next: str | None = Field(
        description="Where the next page is; following it meets every patient once, whoever comes or goes meanwhile",
        examples=["/patients?page=2&page_size=20&after=example"],
    )


@router.get("/patients", response_model=PatientPage, responses=answers(), summary="Look patients up")
def list_patients(
    context: ContextOf,
    caller: CallerOf,
    page: Annotated[int, Query(ge=1, le=LAST_PAGE)] = 1,
    page_size: Annotated[int, Query(ge=1, le=200)] = 20,
    mrn: Annotated[Known, Query(description="Medical record number, as it is written")] = None,
    first_name: Annotated[
        Known, Query(description="The first given name, or all of them; capitals do not matter")
    ] = None,
    last_name: Annotated[Known, Query(description="Family name; capitals do not matter")] = None,
    after: Annotated[
        str | None, Query(pattern=ID, description="Begin after this id, whatever `page` says: `next` does so")
    ] = None,
) -> Response:
    """All patients, or those who are known by what is given, by whole words, since what is encrypted is found by
    equality alone. The first page and the last are as fast as each other. Whom consent withholds is not listed.
    """
    search = Search(mrn=mrn, given=first_name, family=last_name)
    with context.connection() as conn:
        if search:
            found = context.directory.find(conn, search, page, page_size, after=after)
        else:
            found = context.directory.page(conn, page, page_size, after=after)
        withheld = patients.refused(conn, context.settings.gate, found.ids)
        people = _patients(conn, [each for each in found.ids if each not in withheld])
        audit_records = [_audit_record(conn, caller, person["id"], page=page) for person in people]
        nobody = AuditRecord(_action(conn), caller.actor, "Patient", request_id=caller.request_id, detail={"found": 0})
    context.note(*(audit_records or [nobody]))
    following = None
    if len(found.ids) == page_size:
        given = {"mrn": mrn, "first_name": first_name, "last_name": last_name}
        following = "/patients?" + urlencode(
            {
                "page": min(page + 1, LAST_PAGE),
                "page_size": page_size,
                **{name: value for name, value in given.items() if value is not None},
                "after": found.ids[-1],
            }
        )
    content = {
        "total": found.total,
        "page": page,
        "page_size": page_size,
        "patients": people,
        "next": following,
    }
    return Response(orjson.dumps(content), media_type="application/json")


@router.get(
    "/patients/{patient_id}",
    response_model=Patient,
    responses=answers(404, 410),
    summary="One patient with visits",
)
def one_patient(context: ContextOf, caller: CallerOf, patient_id: PatientId) -> Response:
    """403 if consent withholds the patient, 410 if the source deleted it."""
    return _one(context, caller, patient_id)


@router.get(
    "/api/v1/patients/{patient_id}",
    response_model=Patient,
    responses=answers(404, 410),
    summary="One patient with visits",
)
def one_patient_v1(context: ContextOf, caller: CallerOf, patient_id: PatientId) -> Response:
    """The same as `/patients/{patient_id}`."""
    return _one(context, caller, patient_id)


def _one(context: AppContext, caller: Caller, patient_id: str) -> Response:
    gate = context.settings.gate
    with context.connection() as conn:
        withheld = patients.refused(conn, gate, [patient_id])
        found = [] if withheld else _patients(conn, [patient_id])
        absence = Absence() if found else patients.why_absent(conn, patient_id)
        # Under a gate that is closed for strangers, only whoever is known is said to be withheld.
        refused = absence.withheld or bool(withheld and patient_directory.of_patients(conn, "Patient", [patient_id]))
        audit_record = _audit_record(conn, caller, patient_id, found=len(found), refused=refused)
    context.note(audit_record)
    if refused:
        raise Problem(
            403,
            f"the patient's consent does not allow this (CONSENT_POLICY is {gate.policy}, for {gate.purpose})",
            more={"reason": "consent"},
        )
    if absence.deleted:
        raise Problem(410, "the source deleted this patient")
    if not found:
        raise Problem(404, "there is no such patient")
    return Response(orjson.dumps(found[0]), media_type="application/json")


def _action(conn: Session) -> Action:
    return "decrypt" if cipher_of(conn).on else "read"


def _audit_record(conn: Session, caller: Caller, patient_id: str, **detail: int | bool) -> AuditRecord:
    return AuditRecord(
        _action(conn),
        caller.actor,
        "Patient",
        audit_log.subject(conn, "Patient", patient_id),
        request_id=caller.request_id,
        detail=dict(detail),
    )


def _patients(conn: Session, ids: Sequence[str]) -> list[dict[str, Any]]:
    people = {each.id: orjson.loads(each.body) for each in patient_directory.of_patients(conn, "Patient", ids)}
    visits: dict[str, list[dict[str, Any]]] = {}
    for each in patient_directory.of_patients(conn, "Encounter", ids):
        encounter = orjson.loads(each.body)
        whose = str((encounter.get("subject") or {}).get("reference", "")).rpartition("/")[2]
        visits.setdefault(whose, []).append(_visit(encounter))
    return [
        {
            "id": identity,
            "mrn": _number(people[identity], "MR"),
            "person": _person(people[identity]),
            "visits": sorted(visits.get(identity, []), key=lambda v: (v["visit_date"] or "", v["id"]), reverse=True),
        }
        for identity in ids
        if identity in people
    ]


def _person(patient: dict[str, Any]) -> dict[str, Any]:
    names = patient.get("name") or [{}]
    name = next((each for each in names if each.get("use") in ("official", "usual", None)), names[0])
    deceased = patient.get("deceasedBoolean")
    return {
        "first_name": " ".join(each for each in name.get("given") or [] if each) or None,
        "last_name": name.get("family"),
        "birth_date": patient.get("birthDate"),
        "gender": patient.get("gender"),
        "deceased": True if "deceasedDateTime" in patient else deceased,
    }


def _visit(encounter: dict[str, Any]) -> dict[str, Any]:
    reason = (encounter.get("reasonCode") or [{}])[0]
    coded = next((each.get("display") for each in reason.get("coding") or [] if each.get("display")), None)
    return {
        "id": encounter["id"],
        "visit_account_number": _number(encounter, "AN"),
        "visit_date": (encounter.get("period") or {}).get("start"),
        "status": encounter.get("status"),
        "reason": reason.get("text") or coded,
    }


def _number(resource: dict[str, Any], kind: str) -> str | None:
    """The first identifier of a type of v2-0203."""
    for identifier in resource.get("identifier") or []:
        codes = {each.get("code") for each in (identifier.get("type") or {}).get("coding") or []}
        if kind in codes:
            value = identifier.get("value")
            return value if isinstance(value, str) else None
    return None
