"""Routes that look up patients.

They apply consent, decrypt the data, and write an audit record for every patient that is returned or refused.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any
from urllib.parse import urlencode

import orjson
from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, Field

from fhir_assets.api.access import SSN_ROLES
from fhir_assets.api.context import AppContext, Caller, Context, CurrentCaller
from fhir_assets.api.problems import Problem, problem_responses
from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.privacy.audit import Action, AuditRecord
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.warehouse.ops import audit_log, numbers
from fhir_assets.warehouse.postgres.db.connections import Session, cipher_of
from fhir_assets.warehouse.postgres.queries import patient_directory, patients
from fhir_assets.warehouse.postgres.queries.patient_directory import PatientSearch
from fhir_assets.warehouse.postgres.queries.patients import Absence

router = APIRouter(tags=["patients"])

ID_PATTERN = r"^[A-Za-z0-9\-.]{1,64}$"
LAST_PAGE = 10_000_000

PatientId = Annotated[str, Path(pattern=ID_PATTERN, examples=["example"])]
SearchTerm = Annotated[str | None, Query(min_length=1, max_length=256, pattern=r"^[^\x00]*$")]


class Person(BaseModel):
    """The demographics of a patient."""

    first_name: str | None = None
    last_name: str | None = None
    birth_date: str | None = Field(None, examples=["1970-01-31"])
    gender: str | None = None
    deceased: bool | None = None


class Visit(BaseModel):
    """An encounter."""

    id: str
    number: int = Field(description="An integer that stands for the id")
    visit_account_number: str | None = None
    visit_date: str | None = None
    status: str | None = None
    reason: str | None = None
    created_at: datetime | None = Field(None, description="When the visit was first loaded")


class Patient(BaseModel):
    """A patient with all visits, newest first."""

    id: str
    number: int = Field(description="An integer that stands for the id: `/patients?number=`")
    mrn: str | None = None
    person: Person
    visits: list[Visit]
    created_at: datetime | None = Field(None, description="When the patient was first loaded")


class PatientPage(BaseModel):
    """A page of patients, ordered by id."""

    total: int = Field(description="The number of patients; without a search it may be up to 30 seconds old")
    page: int
    page_size: int
    patients: list[Patient]
    next: str | None = Field(
        description="The URL of the next page. A client that follows it gets every patient exactly once, even if "
        "patients are added or removed meanwhile",
        examples=["/patients?page=2&page_size=20&after=example"],
    )


@router.get("/patients", response_model=PatientPage, responses=problem_responses(), summary="Search patients")
def list_patients(
    context: Context,
    caller: CurrentCaller,
    page: Annotated[int, Query(ge=1, le=LAST_PAGE)] = 1,
    page_size: Annotated[int, Query(ge=1, le=200)] = 20,
    mrn: Annotated[SearchTerm, Query(description="Medical record number; case-sensitive")] = None,
    first_name: Annotated[
        SearchTerm, Query(description="The first given name, or all given names; case-insensitive")
    ] = None,
    last_name: Annotated[SearchTerm, Query(description="Family name; case-insensitive")] = None,
    ssn: Annotated[
        str | None,
        Query(
            pattern=r"^[0-9]{3}-?[0-9]{2}-?[0-9]{4}$",
            description="US social security number, with or without hyphens; needs the role registrar or admin",
        ),
    ] = None,
    number: Annotated[
        int | None, Query(ge=1, lt=2**63, description="The `number` of a patient; other parameters do not matter")
    ] = None,
    after: Annotated[
        str | None,
        Query(
            pattern=ID_PATTERN, description="Return the patients after this id and ignore `page`; `next` contains it"
        ),
    ] = None,
) -> Response:
    """All patients, or those that match all search parameters.

    Names match only completely, because encrypted values can only be compared for equality. All pages are equally fast.
    Patients whose data consent withholds are not listed.
    """
    if ssn is not None and caller.token.role not in SSN_ROLES:
        raise Problem(403, "this token may not search by social security number: use one with the role registrar")
    consent_gate = build_consent_gate(context.settings)
    search = PatientSearch(mrn=mrn, given=first_name, family=last_name, ssn=ssn)
    with context.connection() as conn:
        if number is not None:
            result = patient_directory.PatientPage.of(numbers.find_id(conn, "Patient", number))
        elif search:
            result = context.directory.find(conn, search, page, page_size, after=after)
        else:
            result = context.directory.page(conn, page, page_size, after=after)
        withheld = patients.find_withheld(conn, consent_gate, result.ids)
        allowed = [patient_id for patient_id in result.ids if patient_id not in withheld]
        matches = _read_patients(conn, allowed, consent_gate)
        by = {} if ssn is None else {"by": "ssn"}
        audit_records = [_audit_record(conn, caller, patient["id"], page=page, **by) for patient in matches]
        empty_search = AuditRecord(
            _action(conn), caller.actor, "Patient", request_id=caller.request_id, detail={"found": 0, **by}
        )
    context.record_audit(*(audit_records or [empty_search]))
    next_page = None
    # A number names one patient, and a URL that repeats a social security number would be one more place that has it.
    if len(result.ids) == page_size and number is None and ssn is None:
        terms = {"mrn": mrn, "first_name": first_name, "last_name": last_name}
        next_page = "/patients?" + urlencode(
            {
                "page": min(page + 1, LAST_PAGE),
                "page_size": page_size,
                **{name: value for name, value in terms.items() if value is not None},
                "after": result.ids[-1],
            }
        )
    content = {
        "total": result.total if number is None else len(matches),
        "page": page,
        "page_size": page_size,
        "patients": matches,
        "next": next_page,
    }
    return Response(orjson.dumps(content), media_type="application/json")


@router.get(
    "/patients/{patient_id}",
    response_model=Patient,
    responses=problem_responses(404, 410),
    summary="One patient with visits",
)
def one_patient(context: Context, caller: CurrentCaller, patient_id: PatientId) -> Response:
    """The status is 403 if consent withholds the patient, and 410 if the source deleted the patient."""
    return _answer_patient(context, caller, patient_id)


@router.get(
    "/api/v1/patients/{patient_id}",
    response_model=Patient,
    responses=problem_responses(404, 410),
    summary="One patient with visits",
)
def one_patient_v1(context: Context, caller: CurrentCaller, patient_id: PatientId) -> Response:
    """The same answer as `/patients/{patient_id}`."""
    return _answer_patient(context, caller, patient_id)


def _answer_patient(context: AppContext, caller: Caller, patient_id: str) -> Response:
    consent_gate = build_consent_gate(context.settings)
    with context.connection() as conn:
        withheld = patients.find_withheld(conn, consent_gate, [patient_id])
        matches = [] if withheld else _read_patients(conn, [patient_id], consent_gate)
        absence = Absence() if matches else patients.explain_absence(conn, patient_id)
        # A policy that denies by default also withholds unknown ids, but the answer for an unknown id is always 404.
        refused = absence.withheld or bool(
            withheld and patient_directory.read_compartments(conn, "Patient", [patient_id], ConsentGate())
        )
        audit_record = _audit_record(conn, caller, patient_id, found=len(matches), refused=refused)
    context.record_audit(audit_record)
    if refused:
        raise Problem(
            403,
            f"the patient's consent does not allow this access (CONSENT_POLICY is {consent_gate.policy}, for "
            f"{consent_gate.purpose})",
            more={"reason": "consent"},
        )
    if absence.deleted:
        raise Problem(410, "the source deleted this patient")
    if not matches:
        raise Problem(404, "there is no patient with this id")
    return Response(orjson.dumps(matches[0]), media_type="application/json")


def _action(conn: Session) -> Action:
    return "decrypt" if cipher_of(conn).encrypts else "read"


def _audit_record(conn: Session, caller: Caller, patient_id: str, **detail: str | int | bool) -> AuditRecord:
    return AuditRecord(
        _action(conn),
        caller.actor,
        "Patient",
        audit_log.hash_subject(conn, "Patient", patient_id),
        request_id=caller.request_id,
        detail=dict(detail),
    )


def _read_patients(conn: Session, ids: Sequence[str], consent_gate: ConsentGate) -> list[dict[str, Any]]:
    """Return the patients that are in the tables with their visits, in the order of ``ids``."""
    by_id = {row.id: row for row in patient_directory.read_compartments(conn, "Patient", ids, consent_gate)}
    encounters = patient_directory.read_compartments(conn, "Encounter", ids, consent_gate)
    patient_numbers = numbers.ensure(conn, "Patient", list(by_id))
    visit_numbers = numbers.ensure(conn, "Encounter", [row.id for row in encounters])
    visits: dict[str, list[dict[str, Any]]] = {}
    for row in encounters:
        encounter = orjson.loads(row.body)
        patient_id = str((encounter.get("subject") or {}).get("reference", "")).rpartition("/")[2]
        visit = {**_visit(encounter), "number": visit_numbers[row.id], "created_at": row.created_at}
        visits.setdefault(patient_id, []).append(visit)
    bodies = {patient_id: orjson.loads(row.body) for patient_id, row in by_id.items()}
    return [
        {
            "id": patient_id,
            "number": patient_numbers[patient_id],
            "created_at": by_id[patient_id].created_at,
            "mrn": _identifier(bodies[patient_id], "MR"),
            "person": _person(bodies[patient_id]),
            "visits": sorted(
                visits.get(patient_id, []), key=lambda visit: (visit["visit_date"] or "", visit["id"]), reverse=True
            ),
        }
        for patient_id in ids
        if patient_id in by_id
    ]


def _person(patient: dict[str, Any]) -> dict[str, Any]:
    names = patient.get("name") or [{}]
    name = next((candidate for candidate in names if candidate.get("use") in ("official", "usual", None)), names[0])
    deceased = patient.get("deceasedBoolean")
    return {
        "first_name": " ".join(given for given in name.get("given") or [] if given) or None,
        "last_name": name.get("family"),
        "birth_date": patient.get("birthDate"),
        "gender": patient.get("gender"),
        "deceased": True if "deceasedDateTime" in patient else deceased,
    }


def _visit(encounter: dict[str, Any]) -> dict[str, Any]:
    reason = (encounter.get("reasonCode") or [{}])[0]
    display = next((coding.get("display") for coding in reason.get("coding") or [] if coding.get("display")), None)
    return {
        "id": encounter["id"],
        "visit_account_number": _identifier(encounter, "AN"),
        "visit_date": (encounter.get("period") or {}).get("start"),
        "status": encounter.get("status"),
        "reason": reason.get("text") or display,
    }


def _identifier(resource: dict[str, Any], type_code: str) -> str | None:
    """Return the first identifier of a type, a code of HL7 v2 table 0203."""
    for identifier in resource.get("identifier") or []:
        codes = {coding.get("code") for coding in (identifier.get("type") or {}).get("coding") or []}
        if type_code in codes:
            value = identifier.get("value")
            return value if isinstance(value, str) else None
    return None
