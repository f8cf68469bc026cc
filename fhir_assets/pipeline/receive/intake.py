"""Validate records that are posted over HTTP, and turn the accepted ones into Records for a Receiver."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
import orjson

from fhir_assets.catalog import LOAD_ORDER
from fhir_assets.fhir.intake import resources, schemas
from fhir_assets.fhir.intake.resources import DeriveId
from fhir_assets.fhir.record import MalformedResource, Record, build_record, read_header, to_single_line
from fhir_assets.fhir.validation import Validator
from fhir_assets.fhir.validation.issues import STRUCTURE, Issue
from fhir_assets.fhir.validation.primitives import is_id

SCHEMA = "schema"
"""The rule of issues that the JSON Schema of a patient record reports."""

_T = TypeVar("_T")
_URN = re.compile(rb'"(urn:uuid:[0-9a-fA-F-]{36})"')


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

    def validate_bodies(self, bodies: Iterable[bytes]) -> list[ValidatedRecord]:
        """Validate bodies, each a FHIR resource or a patient record, and return the results in the same order."""
        return [self._validate(index, to_single_line(body)) for index, body in enumerate(bodies)]

    def validate_entries(self, entries: Sequence[tuple[str | None, bytes]]) -> list[ValidatedRecord]:
        """Validate the entries of a Bundle, each a full URL and a resource, like ``validate_bodies``.

        References to ``urn:uuid:…`` full URLs are replaced by references to the resources' ids.
        """
        known = {}
        for index, (url, body) in enumerate(entries):
            if url and url.startswith("urn:uuid:"):
                try:
                    header = read_header(body)
                except MalformedResource:
                    continue
                known[url.encode()] = f'"{header.resourceType}/{header.id or self._assign_id(index)}"'.encode()

        def resolve(match: re.Match[bytes]) -> bytes:
            return known.get(match[1], match[0])

        return self.validate_bodies(_URN.sub(resolve, body) if known else body for _, body in entries)

    def _validate(self, index: int, body: bytes) -> ValidatedRecord:
        try:
            header = read_header(body)
        except MalformedResource as error:
            return ValidatedRecord(None, None, (Issue(error.rule, "error", "Resource", str(error)),))
        name = header.resourceType
        if name == "Patient" and resources.is_patient_record(value := _parse_json(body)):
            return self._validate_patient_record(value)
        if name not in LOAD_ORDER or name not in self._types:
            known_name = name if name in LOAD_ORDER else None
            return ValidatedRecord(known_name, None, (Issue(STRUCTURE, "error", "Resource", self._describe_types()),))
        if header.id is None and body[:1] == b"{":
            header.id = self._assign_id(index)
            body = b'{"id":"' + header.id.encode() + b'",' + body[1:].lstrip()
        result = self._validator.check(body)
        if not result.valid:
            return ValidatedRecord(name, header.id if is_id(header.id or "") else None, result.issues)
        return ValidatedRecord(name, header.id, result.issues, (build_record(body, header, self._now, posted=True),))

    def _validate_patient_record(self, record: dict[str, Any]) -> ValidatedRecord:
        if errors := schemas.find_errors("patient_record", record):
            issues = (
                Issue(SCHEMA, "error", f"Patient{error.path.replace('/', '.')}", error.message) for error in errors
            )
            return ValidatedRecord("Patient", None, tuple(issues))
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

    def _assign_id(self, index: int) -> str:
        return hashlib.sha256(f"{self._origin}#{index}".encode()).hexdigest()[:32]

    def _describe_types(self) -> str:
        return f"this deployment does not load the resource type; it loads {', '.join(sorted(self._types))}"


def _parse_json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


class _Submission(msgspec.Struct, forbid_unknown_fields=True):
    records: list[msgspec.Raw]


class _Entry(msgspec.Struct):
    fullUrl: str | None = None  # noqa: N815
    resource: msgspec.Raw = msgspec.Raw(b"null")
    request: dict[str, Any] | None = None


class _Bundle(msgspec.Struct):
    resourceType: str  # noqa: N815
    type: str = ""
    entry: list[_Entry] = []


class UnreadableBody(ValueError):
    """A request body that cannot be parsed. The message has the reason without the content."""


def read_submission(body: bytes) -> list[bytes]:
    """Return the records of a body ``{"records": […]}``. Raises UnreadableBody."""
    return [bytes(record) for record in _decode(body, _SUBMISSION).records]


@dataclass(frozen=True, slots=True)
class PostedBody:
    """The body of a POST to a FHIR endpoint: its entries as pairs of full URL and resource.

    If ``atomic``, an entry with errors rejects all entries.
    """

    entries: tuple[tuple[str | None, bytes], ...]
    atomic: bool
    is_bundle: bool


def read_posted_body(body: bytes) -> PostedBody:
    """Read a resource, or the entries of a Bundle. Raises UnreadableBody."""
    try:
        header = read_header(body)
    except MalformedResource as error:
        raise UnreadableBody(str(error)) from None
    if header.resourceType != "Bundle":
        return PostedBody(((None, body),), atomic=True, is_bundle=False)
    bundle = _decode(body, _BUNDLE)
    if bundle.type not in ("batch", "transaction", "collection"):
        raise UnreadableBody("the type of a Bundle must be batch, transaction or collection")
    entries = []
    for entry in bundle.entry:
        if bytes(entry.resource) == b"null" or str((entry.request or {}).get("method", "PUT")) not in ("PUT", "POST"):
            raise UnreadableBody(
                "every entry must have a resource, and its request method, if any, must be PUT or POST"
            )
        entries.append((entry.fullUrl, bytes(entry.resource)))
    return PostedBody(tuple(entries), atomic=bundle.type == "transaction", is_bundle=True)


_SUBMISSION = msgspec.json.Decoder(_Submission)
_BUNDLE = msgspec.json.Decoder(_Bundle)


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


def request_time() -> datetime:
    """Return the current time. A request calls this once, so that all of its resources arrive at the same time."""
    return datetime.now(UTC)
