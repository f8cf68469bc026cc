"""What flows through the pipeline: one resource as its received bytes, with the few facts that route it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from fhir_assets.errors import PermanentError


@dataclass(frozen=True, slots=True)
class Record:
    """A resource as it was received: ``body`` is its JSON on one line, without the line feed, digits and key
    order untouched. ``arrived`` places a resource without ``meta.lastUpdated`` into a window. ``patients`` are the
    ids of those whose compartment it belongs to, None where nobody looked yet.
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
        """The time that orders the versions of a resource and picks its window."""
        return self.last_updated or self.arrived


@dataclass(frozen=True, slots=True)
class RejectedInput:
    """Something received that cannot become a Record: the seed of a dead letter of stage ``fetch``.

    ``path`` says where it was found (``Patient.ndjson.gz:17``); ``message`` holds no patient data. ``issues`` are all
    that is wrong with it where that is more than one thing, as dead letters keep them. ``origin`` is what it came by,
    where that is part of what is received.
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
    """A resource that the source deleted at ``at``; ``version_id`` is that of the deletion, where one is known."""

    resource_type: str
    id: str
    at: datetime
    version_id: str | None = None


class Meta(msgspec.Struct):
    versionId: str | None = None  # noqa: N815
    lastUpdated: str | None = None  # noqa: N815


class ResourceHeader(msgspec.Struct):
    """The part of a resource that is read before validation."""

    resourceType: str  # noqa: N815
    id: str | None = None
    meta: Meta | None = None


class MalformedResource(PermanentError):
    """Bytes that are not a JSON object with a resourceType, or whose id or meta has the wrong JSON type.

    ``rule`` is ``json`` or ``structure``, as validation calls them.
    """

    def __init__(self, message: str, rule: str) -> None:
        super().__init__(message)
        self.rule = rule


_header = msgspec.json.Decoder(ResourceHeader)


def to_single_line(body: bytes) -> bytes:
    """JSON on one line: raw line ends can only be insignificant white space, so they become blanks."""
    if b"\n" in body or b"\r" in body:
        body = body.replace(b"\r", b" ").replace(b"\n", b" ")
    return body.strip()


def read_header(body: bytes) -> ResourceHeader:
    """Decode ``resourceType``, ``id`` and ``meta``, skipping the rest. Raises Malformed, without the content."""
    try:
        return _header.decode(body)
    except msgspec.ValidationError as error:
        raise MalformedResource(f"not a FHIR resource: {error}", "structure") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        why = error if isinstance(error, msgspec.DecodeError) else type(error).__name__
        raise MalformedResource(f"not JSON: {why}", "json") from None


def build_record(body: bytes, header: ResourceHeader, arrived: datetime) -> Record:
    """The Record of a resource on one line whose header was read; its id is empty if it has none."""
    meta = header.meta
    identity = header.id or ""
    if meta is None:
        return Record(header.resourceType, identity, None, None, arrived, body)
    return Record(header.resourceType, identity, meta.versionId, parse_instant(meta.lastUpdated), arrived, body)


def parse_instant(text: str | None) -> datetime | None:
    """A FHIR instant in UTC, None if it is absent or not an instant with a zone."""
    if not text:
        return None
    try:
        value = datetime.fromisoformat(text)
        return value.astimezone(UTC) if value.tzinfo else None
    except (ValueError, OverflowError):
        return None
