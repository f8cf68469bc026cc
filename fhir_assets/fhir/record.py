"""Records: resources as received, with the header fields that the pipeline needs to route and to order them.

The order of the versions of a resource: ``meta.lastUpdated`` decides between two versions that both have one, and a
numeric ``meta.versionId`` if these are equal. If one of the two has none, the version that arrived last is the newer
one. A ``lastUpdated`` counts only if the clock of a server can have set it (``CLOCK_SKEW``); what a client of the HTTP
API sends never counts (https://hl7.org/fhir/R4/http.html#update).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import msgspec

from fhir_assets.errors import PermanentError
from fhir_assets.fhir.half_surrogates import HALF_SURROGATE_PAIR, mask_half_surrogates
from fhir_assets.windows import EARLIEST, LATEST, add_clamped

CLOCK_SKEW = timedelta(minutes=5)
"""How far a server's clock may be ahead of the local clock.

A later ``meta.lastUpdated`` cannot be the time of a change: the time of arrival is used instead.
"""


@dataclass(frozen=True, slots=True)
class Record:
    """A resource as received. ``body`` is its JSON on one line without the line feed; digits and key order are
    unchanged.

    ``last_updated`` is ``meta.lastUpdated``, None if the resource has none or if it does not count; ``dated`` is False
    if the resource has one that does not count. ``arrived`` orders resources without ``last_updated`` and determines
    their window. It also determines the window of a ``late`` resource, which the source returned although it is outside
    of the requested time range.

    ``patients`` are the ids of the patients whose compartment contains the resource, and ``keyless`` describes its
    references that have no key (``references.find_keyless``). ``mentions`` are the other targets of its references
    (``subjects.find_subjects``), which only consent needs. ``identifiers`` are hashes of its identifiers, and of those
    in its conditional references (``conditional_references``). Each is None if it has not been determined.
    """

    resource_type: str
    id: str
    version_id: str | None
    last_updated: datetime | None
    arrived: datetime
    body: bytes
    patients: tuple[str, ...] | None = None
    dated: bool = True
    late: bool = False
    keyless: tuple[str, ...] | None = None
    mentions: tuple[str, ...] | None = None
    identifiers: tuple[str, ...] | None = None

    @property
    def as_of(self) -> datetime:
        """The time of the version: ``last_updated``, or ``arrived`` without one. It determines the window."""
        return self.last_updated or self.arrived

    @property
    def version_key(self) -> tuple[str, str | int | None, datetime | None]:
        """The key by which a version is recognized when the source returns it again within this process.

        The content is part of the key, because different versions may have equal ``versionId`` and ``lastUpdated``.
        """
        if self.version_id is None or self.last_updated is None:
            return self.id, hash(self.body), self.last_updated
        return self.id, self.version_id, self.last_updated


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


class Meta(msgspec.Struct, rename="camel"):
    """The part of ``Resource.meta`` that is read before validation."""

    version_id: str | None = None
    last_updated: str | None = None


class ResourceHeader(msgspec.Struct, rename="camel"):
    """The part of a resource that is read before validation."""

    resource_type: str
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
        if mask_half_surrogates(body) is not body:
            raise MalformedResource(HALF_SURROGATE_PAIR, "json") from None
        reason = error if isinstance(error, msgspec.DecodeError) else type(error).__name__
        raise MalformedResource(f"not JSON: {reason}", "json") from None


def build_record(
    body: bytes, header: ResourceHeader, arrived: datetime, *, received: datetime | None = None, posted: bool = False
) -> Record:
    """Return the Record of a resource on one line and its header. The id is empty if the resource has none.

    ``received`` is the time at which the source was read, if it is later than ``arrived``. A ``lastUpdated`` that is
    later than ``received`` by more than CLOCK_SKEW does not count. If the resource was ``posted``, its ``lastUpdated``
    never counts, because a server ignores the value that a client sends.
    """
    meta = header.meta
    resource_id = header.id or ""
    if meta is None:
        return Record(header.resource_type, resource_id, None, None, arrived, body)
    moment = parse_instant(meta.last_updated)
    if moment is not None and (posted or (moment > arrived and not is_credible(moment, received or arrived))):
        return Record(header.resource_type, resource_id, meta.version_id, None, arrived, body, dated=False)
    return Record(header.resource_type, resource_id, meta.version_id, moment, arrived, body)


def parse_stored(last_updated: str | None, *, dated: bool, arrival_known: bool) -> datetime | None:
    """Return the ``meta.lastUpdated`` of a line of the store if it counts.

    ``dated`` is that of the line's part. Parts of releases that did not record arrivals have dates in the future.
    """
    moment = parse_instant(last_updated) if dated else None
    if moment is None or arrival_known or is_credible(moment, datetime.now(UTC)):
        return moment
    return None


def is_credible(moment: datetime, received: datetime) -> bool:
    """Return whether a server can have assigned this time to a resource that was received from it at ``received``."""
    return moment - received <= CLOCK_SKEW


_LEAP_SECOND = re.compile(r"(?<=[T ]\d\d:\d\d:)60").subn


def parse_instant(text: str | None) -> datetime | None:
    """Parse a FHIR instant and return it in UTC; None if it is absent or is not an instant with a time zone.

    A leap second is converted to the following second. A time outside of the years 1 to 9999 in UTC is converted to the
    first or the last moment of these years.
    """
    if not text:
        return None
    try:
        value = datetime.fromisoformat(text)
    except ValueError:
        before, leap_seconds = _LEAP_SECOND("59", text, 1)
        if not leap_seconds:
            return None
        second_before = parse_instant(before)
        return add_clamped(second_before, timedelta(seconds=1)) if second_before else None
    if value.tzinfo is None:
        return None
    try:
        return value.astimezone(UTC)
    except OverflowError:
        return EARLIEST if value.year == 1 else LATEST
