"""Validates records that are posted over HTTP, and turns the accepted ones into Records for a Receiver."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, TypeVar

import msgspec
import orjson

from fhir_assets.catalog import LOAD_ORDER
from fhir_assets.fhir import containers
from fhir_assets.fhir.containers import CONTAINERS, ContainedResource, Pages
from fhir_assets.fhir.intake import cells, clinical_records, resources, schemas
from fhir_assets.fhir.intake.resources import DeriveId
from fhir_assets.fhir.record import MalformedResource, Record, build_record, read_header, to_single_line
from fhir_assets.fhir.validation import Validator
from fhir_assets.fhir.validation.issues import STRUCTURE, Issue
from fhir_assets.fhir.validation.primitives import is_id

SCHEMA = "schema"
"""The rule of issues that the JSON Schema of a patient record reports."""

_CONTAINER = "a container of resources: post it to /fhir"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ValidatedRecord:
    """The result of one posted record: its issues, and its resources; no resources if it is rejected."""

    resource_type: str | None
    id: str | None
    issues: tuple[Issue, ...]
    records: tuple[Record, ...] = field(default=(), repr=False)

    @property
    def accepted(self) -> bool:
        """Whether the record has no errors."""
        return bool(self.records)


class IntakeValidator:
    """Validates the records of one request.

    ``origin`` names the request. Ids of resources without one are derived from it, so that a repeated request assigns
    the same ids.
    """

    def __init__(
        self, validator: Validator, derive_id: DeriveId, resource_types: Sequence[str], origin: str, now: datetime
    ) -> None:
        self._validator = validator
        self._derive_id = derive_id
        self._types = frozenset(resource_types)
        self._origin = origin
        self._now = now
        self._derived: dict[str, bytes] = {}

    def validate_bodies(self, bodies: Iterable[bytes]) -> list[ValidatedRecord]:
        """Validate bodies, each a FHIR resource or an intake record, and return the results in the same order."""
        return [self._validate(index, to_single_line(body)) for index, body in enumerate(bodies)]

    def _validate(self, index: int, body: bytes) -> ValidatedRecord:
        try:
            header = read_header(body)
        except MalformedResource as error:
            return ValidatedRecord(None, None, (Issue(error.rule, "error", "Resource", str(error)),))
        name = header.resource_type
        if name == "Patient" and resources.is_patient_record(value := _parse_json(body)):
            return self._validate_patient_record(value)
        if name not in LOAD_ORDER or name not in self._types:
            known_name = name if name in LOAD_ORDER else None
            message = _CONTAINER if name in CONTAINERS else self._describe_types()
            return ValidatedRecord(known_name, None, (Issue(STRUCTURE, "error", "Resource", message),))
        if name == "Observation" and b'"mrn"' in body and resources.is_observation_record(value := _parse_digits(body)):
            return self._validate_observation_record(value)
        if name in clinical_records.TYPES and b'"mrn"' in body:
            value = _parse_json(body)
            if clinical_records.is_clinical_record(value):
                return self._validate_clinical_record(value)
        if header.id is None and body[:1] == b"{":
            header.id = self._assign_id(index)
            body = containers.insert_id(body, header.id)
        result = self._validator.check(body)
        if not result.valid:
            return ValidatedRecord(name, header.id if is_id(header.id or "") else None, result.issues)
        return ValidatedRecord(name, header.id, result.issues, (build_record(body, header, self._now, posted=True),))

    def _validate_patient_record(self, record: dict[str, Any]) -> ValidatedRecord:
        if issues := _find_issues("patient_record", record, cells.find_patient_problems):
            return ValidatedRecord("Patient", None, issues)
        built = resources.build_patient_resources(
            record, self._derive_id, now=self._now.isoformat(timespec="milliseconds")
        )
        if len(built) > 1 and "Consent" not in self._types:
            # The patient record must not be accepted without its consent.
            return ValidatedRecord(
                "Patient", None, (Issue(STRUCTURE, "error", "Patient.consent", self._describe_types()),)
            )
        records: list[Record] = []
        for resource in built:
            body = resources.encode_resource(resource)
            result = self._validator.check(body)
            if not result.valid:
                return ValidatedRecord("Patient", None, result.issues)
            records.append(build_record(body, read_header(body), self._now, posted=True))
        return ValidatedRecord("Patient", records[0].id, (), tuple(records))

    def _validate_observation_record(self, record: dict[str, Any]) -> ValidatedRecord:
        if issues := _find_issues("observation_record", record, cells.find_observation_problems):
            return ValidatedRecord("Observation", None, issues)
        return self._accept(resources.build_observation(record, self._derive_id), "patient, code, time and value")

    def _validate_clinical_record(self, record: dict[str, Any]) -> ValidatedRecord:
        if issues := _find_issues("clinical_record", record, cells.find_clinical_problems):
            return ValidatedRecord(record["resourceType"], None, issues)
        return self._accept(clinical_records.build_clinical_resource(record, self._derive_id), "patient, code and date")

    def _accept(self, resource: dict[str, Any], identity: str) -> ValidatedRecord:
        """Validate the resource of a short record; ``identity`` names the members that its id is derived from."""
        name, body = resource["resourceType"], resources.encode_resource(resource)
        result = self._validator.check(body)
        if result.valid and self._derived.setdefault(f"{name}/{resource['id']}", body) != body:
            message = f"another record of the request has the same {identity}: give each of them an id"
            return ValidatedRecord(name, None, (Issue(SCHEMA, "error", f"{name}.id", message),))
        if not result.valid:
            return ValidatedRecord(name, None, result.issues)
        built = build_record(body, read_header(body), self._now, posted=True)
        return ValidatedRecord(name, built.id, result.issues, (built,))

    def _assign_id(self, index: int) -> str:
        return hashlib.sha256(f"{self._origin}#{index}".encode()).hexdigest()[:32]

    def _describe_types(self) -> str:
        return f"this deployment does not load the resource type; it loads {', '.join(sorted(self._types))}"


def _find_issues(
    name: schemas.SchemaName,
    record: dict[str, Any],
    find_problems: Callable[[Mapping[str, object]], Iterable[tuple[str, str]]],
) -> tuple[Issue, ...]:
    """Return the issues of an intake record: those of its schema, or else those of its values."""
    resource_type = record["resourceType"]
    if errors := schemas.find_errors(name, record):
        found = [(error.path.replace("/", "."), error.message) for error in errors]
    else:
        found = [(f".{member}", message) for member, message in find_problems(record)]
    return tuple(Issue(SCHEMA, "error", f"{resource_type}{path}", message) for path, message in found)


def _parse_digits(body: bytes) -> Any:
    """Parse JSON with Decimals for numbers with a fraction. Return None for text that is not JSON."""
    try:
        return _DECIMALS.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _parse_json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


class _Submission(msgspec.Struct, forbid_unknown_fields=True):
    records: list[msgspec.Raw]


class _Bundle(msgspec.Struct):
    type: Any = None


class UnreadableBody(ValueError):
    """A request body that cannot be parsed. The message has the reason without the content."""


def read_submission(body: bytes) -> list[bytes]:
    """Return the records of a body ``{"records": […]}``. Raises UnreadableBody."""
    return [bytes(record) for record in _decode(body, _SUBMISSION).records]


@dataclass(frozen=True, slots=True)
class PostedBody:
    """The body of a POST to a FHIR endpoint: the resources in it, and their locations, such as ``Bundle.entry[0]``.

    If ``atomic``, a resource with errors rejects all of them. The location of a body that is a resource is empty.
    """

    bodies: tuple[bytes, ...]
    locations: tuple[str, ...]
    atomic: bool


def read_posted_body(body: bytes) -> PostedBody:
    """Read a resource, or the resources of a Bundle of any type, of Parameters, or of an array of these.

    References to the full URLs of entries are resolved. Raises UnreadableBody, for example for a container with a part
    that cannot be received, such as a deletion.
    """
    if body.lstrip()[:1] == b"[":
        elements = _decode(body, _ARRAY)
        if not elements:
            raise UnreadableBody("an array without resources")
        pages = Pages()
        found = [
            posted for n, element in enumerate(elements) for posted in _read_element(bytes(element), f"[{n}]", pages)
        ]
        _require_complete(pages)
        return PostedBody(tuple(part.body for part in found), tuple(part.location for part in found), atomic=False)
    name = _read_type(body)
    if name not in CONTAINERS:
        return PostedBody((body,), ("",), atomic=True)
    pages = Pages()
    parts = _read_element(body, "", pages)
    _require_complete(pages)
    locations = tuple("" if part.location == "document" else f"{name}.{part.location}" for part in parts)
    atomic = name == "Bundle" and _decode(body, _BUNDLE).type == "transaction"
    return PostedBody(tuple(part.body for part in parts), locations, atomic)


def _read_element(body: bytes, location: str, pages: Pages) -> list[ContainedResource]:
    if _read_type(body) not in CONTAINERS:
        return [ContainedResource(location, body)]
    resources_found = []
    for part in containers.unpack(to_single_line(body), location, pages):
        if isinstance(part, containers.UnusableEntry):
            raise UnreadableBody(f"{part.location}: {part.message}")
        if isinstance(part, containers.DeleteEntry):
            raise UnreadableBody(f"{part.location}: a deletion, which cannot be posted: give it to the landing zone")
        resources_found.append(part)
    return resources_found


def _require_complete(pages: Pages) -> None:
    for problem in pages.unfollowed():
        raise UnreadableBody(f"{problem.location}: {problem.message}")


def _read_type(body: bytes) -> str:
    try:
        return read_header(body).resource_type
    except MalformedResource as error:
        raise UnreadableBody(str(error)) from None


_DECIMALS = msgspec.json.Decoder(float_hook=Decimal)
_SUBMISSION = msgspec.json.Decoder(_Submission)
_BUNDLE = msgspec.json.Decoder(_Bundle)
_ARRAY = msgspec.json.Decoder(list[msgspec.Raw])


def _decode(body: bytes, decoder: msgspec.json.Decoder[_T]) -> _T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        # The message names the unknown field, which may hold patient data.
        raise UnreadableBody(
            "the body has an unknown member" if "unknown field" in str(error) else str(error)
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = error if isinstance(error, msgspec.DecodeError) else type(error).__name__
        raise UnreadableBody(f"not JSON: {reason}") from None
