"""Records that somebody posts: judged at once, one by one, and what is accepted made ready for ``receive``."""

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
"""Rule of an issue that the JSON Schema of an intake record found."""

_T = TypeVar("_T")
_URN = re.compile(rb'"(urn:uuid:[0-9a-fA-F-]{36})"')


@dataclass(frozen=True, slots=True)
class ValidatedRecord:
    """What became of one posted record. ``records`` are its resources, none if it was rejected."""

    resource_type: str | None
    id: str | None
    issues: tuple[Issue, ...]
    records: tuple[Record, ...] = field(default=(), repr=False)

    @property
    def accepted(self) -> bool:
        return bool(self.records)


class IntakeValidator:
    """Judges what one request brings. ``origin`` names the request: an id that has to be given follows from it, so
    that the same request gives the same ids again.
    """

    def __init__(
        self, validator: Validator, identify: DeriveId, resource_types: Sequence[str], origin: str, now: datetime
    ) -> None:
        self._validator = validator
        self._identify = identify
        self._types = frozenset(resource_types)
        self._origin = origin
        self._now = now

    def validate_bodies(self, bodies: Iterable[bytes]) -> list[ValidatedRecord]:
        """Each of them: a FHIR resource, or a patient record."""
        return [self._one(place, to_single_line(body)) for place, body in enumerate(bodies)]

    def validate_entries(self, entries: Sequence[tuple[str | None, bytes]]) -> list[ValidatedRecord]:
        """As ``judge``, of the entries of a Bundle: a full URL and a resource each. References to full URLs that are
        ``urn:uuid:…`` become those to the ids that the resources have here.
        """
        known = {}
        for place, (url, body) in enumerate(entries):
            if url and url.startswith("urn:uuid:"):
                try:
                    header = read_header(body)
                except MalformedResource:
                    continue
                known[url.encode()] = f'"{header.resourceType}/{header.id or self._id(place)}"'.encode()

        def resolved(found: re.Match[bytes]) -> bytes:
            return known.get(found[1], found[0])

        return self.validate_bodies(_URN.sub(resolved, body) if known else body for _, body in entries)

    def _one(self, place: int, body: bytes) -> ValidatedRecord:
        try:
            header = read_header(body)
        except MalformedResource as error:
            return ValidatedRecord(None, None, (Issue(error.rule, "error", "Resource", str(error)),))
        name = header.resourceType
        if name == "Patient" and resources.is_patient_record(value := _parsed(body)):
            return self._patient_record(value)
        if name not in LOAD_ORDER or name not in self._types:
            told = name if name in LOAD_ORDER else None
            return ValidatedRecord(told, None, (Issue(STRUCTURE, "error", "Resource", self._not_loaded()),))
        if header.id is None and body[:1] == b"{":
            header.id = self._id(place)
            body = b'{"id":"' + header.id.encode() + b'",' + body[1:].lstrip()
        verdict = self._validator.check(body)
        if not verdict.valid:
            return ValidatedRecord(name, header.id if is_id(header.id or "") else None, verdict.issues)
        return ValidatedRecord(name, header.id, verdict.issues, (build_record(body, header, self._now),))

    def _patient_record(self, record: dict[str, Any]) -> ValidatedRecord:
        if wrong := schemas.find_errors("patient_record", record):
            issues = (Issue(SCHEMA, "error", f"Patient{each.path.replace('/', '.')}", each.message) for each in wrong)
            return ValidatedRecord("Patient", None, tuple(issues))
        made = resources.build_patient_resources(
            record, self._identify, now=self._now.isoformat(timespec="milliseconds")
        )
        if len(made) > 1 and "Consent" not in self._types:
            # Without it the person's will would be lost.
            return ValidatedRecord("Patient", None, (Issue(STRUCTURE, "error", "Patient.consent", self._not_loaded()),))
        found: list[Record] = []
        for resource in made:
            body = resources.encode_resource(resource)
            verdict = self._validator.check(body)
            if not verdict.valid:
                return ValidatedRecord("Patient", None, verdict.issues)
            found.append(build_record(body, read_header(body), self._now))
        return ValidatedRecord("Patient", found[0].id, (), tuple(found))

    def _id(self, place: int) -> str:
        return hashlib.sha256(f"{self._origin}#{place}".encode()).hexdigest()[:32]

    def _not_loaded(self) -> str:
        return f"a type that is not loaded here; those that are: {', '.join(sorted(self._types))}"


def _parsed(body: bytes) -> Any:
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


class Unreadable(ValueError):
    """A body that is not of the shape that is asked for; says why, without its content."""


def read_submission(body: bytes) -> list[bytes]:
    """The records of ``{"records": […]}``. Raises Unreadable."""
    return [bytes(each) for each in _decoded(body, _SUBMISSION).records]


@dataclass(frozen=True, slots=True)
class PostedBody:
    """What was posted to a FHIR endpoint: entries with full URL and body. ``atomic``: all of them, or none."""

    entries: tuple[tuple[str | None, bytes], ...]
    atomic: bool
    is_bundle: bool


def read_posted(body: bytes) -> PostedBody:
    """A resource, or the entries of a Bundle. Raises Unreadable."""
    try:
        header = read_header(body)
    except MalformedResource as error:
        raise Unreadable(str(error)) from None
    if header.resourceType != "Bundle":
        return PostedBody(((None, body),), atomic=True, is_bundle=False)
    bundle = _decoded(body, _BUNDLE)
    if bundle.type not in ("batch", "transaction", "collection"):
        raise Unreadable("a Bundle that is taken is of type batch, transaction or collection")
    entries = []
    for each in bundle.entry:
        if bytes(each.resource) == b"null" or str((each.request or {}).get("method", "PUT")) not in ("PUT", "POST"):
            raise Unreadable("every entry brings a resource, and asks for PUT or POST if for anything")
        entries.append((each.fullUrl, bytes(each.resource)))
    return PostedBody(tuple(entries), atomic=bundle.type == "transaction", is_bundle=True)


_SUBMISSION = msgspec.json.Decoder(_Submission)
_BUNDLE = msgspec.json.Decoder(_Bundle)


def _decoded(body: bytes, decoder: msgspec.json.Decoder[_T]) -> _T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        # It names what it does not know.
        raise Unreadable(
            "a member beside those that are known" if "unknown field" in str(error) else str(error)
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        why = error if isinstance(error, msgspec.DecodeError) else type(error).__name__
        raise Unreadable(f"not JSON: {why}") from None


def request_time() -> datetime:
    """The time that a request counts as now."""
    return datetime.now(UTC)
