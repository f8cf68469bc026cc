"""Records: resources as received, with the header fields that the pipeline needs to route them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from fhir_assets.errors import PermanentError


@dataclass(frozen=True, slots=True)
class Record:
    """A resource as received.

    ``body`` is its JSON on one line without the line feed; digits and key order are unchanged. ``arrived`` determines
    the window of a resource without ``meta.lastUpdated``. ``patients`` are the ids of the patients whose compartment
    contains the resource, None if they have not been determined.
    """

    resource_type: str
    id: str
    version_id: str | None
    last_updated: datetime | None
    arrived: datetime
    body: bytes
    patients: tuple[str, ...] | None = None

    @property
    def as_of(self) -> datetime:
        """The time that orders the versions of a resource and determines its window."""
        return self.last_updated or self.arrived


@dataclass(frozen=True, slots=True)
class RejectedInput:
    """Received input that cannot become a Record. It becomes a dead letter of stage ``fetch``.

    ``path`` is the location of the input (``Patient.ndjson.gz:17``); ``message`` contains no patient data. ``issues``
    are all issues of the input if there are several, in the JSON form of dead letters. ``origin`` identifies the
    delivery that contained the input; None if it was fetched from the configured source.
    """

    resource_type: str
    resource_id: str | None
    rule: str
    path: str
    message: str
    arrived: datetime
    body: bytes
    issues: tuple[Mapping[str, str], ...] = ()
    origin: str | None = None


@dataclass(frozen=True, slots=True)
class Deletion:
    """The deletion of a resource at the time ``at``. ``version_id`` is the version of the deletion, if known."""

    resource_type: str
    id: str
    at: datetime
    version_id: str | None = None


class Meta(msgspec.Struct):
    """The part of ``Resource.meta`` that is read before validation."""

    versionId: str | None = None  # noqa: N815
    lastUpdated: str | None = None  # noqa: N815


class ResourceHeader(msgspec.Struct):
    """The part of a resource that is read before validation."""

    resourceType: str  # noqa: N815
    id: str | None = None
    meta: Meta | None = None


class MalformedResource(PermanentError):
    """The input is not a JSON object with a resourceType, or its id or meta has the wrong JSON type.

    ``rule`` is the name of the violated validation rule: ``json`` or ``structure``.
    """

    def __init__(self, message: str, rule: str) -> None:
        super().__init__(message)
        self.rule = rule


_header = msgspec.json.Decoder(ResourceHeader)


def to_single_line(body: bytes) -> bytes:
    """Return JSON on one line. Line breaks are insignificant white space in JSON; they are replaced by blanks."""
    if b"\n" in body or b"\r" in body:
        body = body.replace(b"\r", b" ").replace(b"\n", b" ")
    return body.strip()


def read_header(body: bytes) -> ResourceHeader:
    """Decode ``resourceType``, ``id`` and ``meta`` and skip the rest.

    Raises MalformedResource; the message contains no patient data.
    """
    try:
        return _header.decode(body)
    except msgspec.ValidationError as error:
        raise MalformedResource(f"not a FHIR resource: {error}", "structure") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = error if isinstance(error, msgspec.DecodeError) else type(error).__name__
        raise MalformedResource(f"not JSON: {reason}", "json") from None


def build_record(body: bytes, header: ResourceHeader, arrived: datetime) -> Record:
    """Return the Record of a resource on one line and its header. The id is empty if the resource has none."""
    meta = header.meta
    resource_id = header.id or ""
    if meta is None:
        return Record(header.resourceType, resource_id, None, None, arrived, body)
    return Record(header.resourceType, resource_id, meta.versionId, parse_instant(meta.lastUpdated), arrived, body)


def parse_instant(text: str | None) -> datetime | None:
    """Parse a FHIR instant and return it in UTC; None if it is absent or is not an instant with a time zone."""
    if not text:
        return None
    try:
        value = datetime.fromisoformat(text)
        return value.astimezone(UTC) if value.tzinfo else None
    except (ValueError, OverflowError):
        return None
