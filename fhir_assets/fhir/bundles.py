"""Bundles that write resources to a server: their content, their responses, and the order of resource types
(https://hl7.org/fhir/R4/http.html#transaction).

Sending them does not belong here: see ``delivery.upload``.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import orjson

from fhir_assets.catalog import LOAD_ORDER
from fhir_assets.fhir.outcome import reports_error, summarize_issues

BundleType = Literal["batch", "transaction"]
ReferenceTarget = tuple[str, str]
"""Resource type and id of the target of a reference."""

_RETRYABLE_STATUS = frozenset({408, 409, 412, 423, 425, 429})
_PERMANENT_STATUS = frozenset({501, 505})
_SERVER_META = ("versionId", "lastUpdated")


@dataclass(frozen=True, slots=True)
class BundleEntry:
    """A resource to write under its own id.

    ``body`` is its JSON as received. ``location`` is the file and line that it comes from, such as
    ``Patient.ndjson:3``.
    """

    resource_type: str
    id: str
    body: bytes
    location: str = ""

    @property
    def url(self) -> str:
        """The URL of the resource, relative to the server's base URL."""
        return f"{self.resource_type}/{self.id}"


@dataclass(frozen=True, slots=True)
class EntryResult:
    """The result of one entry: its HTTP status (0 if the response has none) and its OperationOutcome, if any.

    ``confirmed`` is False if only the status indicates that the server stored the resource.
    """

    status: int
    outcome: bytes = b""
    confirmed: bool = True

    @property
    def accepted(self) -> bool:
        """Whether the server stored the resource."""
        return self.confirmed and 200 <= self.status < 300

    @property
    def retryable(self) -> bool:
        """Whether the server may accept the same entry on another attempt."""
        return (
            self.status in _RETRYABLE_STATUS
            or (self.status >= 500 and self.status not in _PERMANENT_STATUS)
            or self.status == 0
            or not self.confirmed
        )

    @property
    def reason(self) -> str:
        """The reason for the refusal: the status, and the codes and paths of the issues.

        The texts of the issues are omitted, because they may contain patient data.
        """
        if 200 <= self.status < 300:
            return f"the server answered {self.status}, but does not have what was sent"
        answer = f"the server answered {self.status}" if self.status else "the server gave no answer for it"
        issues = summarize_issues(self.outcome)
        return f"{answer}: {', '.join(issues)}" if issues else answer


def build_put_bundle(kind: BundleType, base_url: str, entries: Iterable[BundleEntry]) -> bytes:
    """Return a Bundle that writes each resource under its id. The bytes of the resources are unchanged."""
    return _bundle(
        kind,
        (
            b'{"fullUrl":%b,"resource":%b,"request":{"method":"PUT","url":%b}}'
            % (orjson.dumps(f"{base_url}/{entry.url}"), entry.body, orjson.dumps(entry.url))
            for entry in entries
        ),
    )


def build_get_bundle(entries: Iterable[BundleEntry]) -> bytes:
    """Return a batch Bundle that reads the server's current resource for each entry."""
    return _bundle("batch", (b'{"request":{"method":"GET","url":%b}}' % orjson.dumps(entry.url) for entry in entries))


def _bundle(kind: BundleType, entries: Iterator[bytes]) -> bytes:
    return b'{"resourceType":"Bundle","type":"%b","entry":[%b]}' % (kind.encode(), b",".join(entries))


@dataclass(frozen=True, slots=True)
class EntryResponse:
    """The response to one entry: its result, its resource (empty if there is none), and its location and ETag."""

    result: EntryResult
    resource: bytes = b""
    location: str = ""
    etag: str = ""

    def confirms(self, entry: BundleEntry) -> bool:
        """Return whether the response confirms, by more than its status, that the server has the resource of the entry.

        It does if it contains the resource itself, or if it has a location or ETag and reports no error.
        """
        if reports_error(self.result.outcome) or reports_error(self.resource):
            return False
        if self.location:
            return f"/{entry.url}/" in f"/{self.location.partition('?')[0]}/"
        return bool(self.etag) or _is_resource(self.resource, entry)


class _Response(msgspec.Struct):
    status: str = ""
    outcome: msgspec.Raw = msgspec.Raw(b"")
    location: str | None = None
    etag: str | None = None


class _ResponseEntry(msgspec.Struct):
    response: _Response = msgspec.field(default_factory=_Response)
    resource: msgspec.Raw = msgspec.Raw(b"")


class _ResponseBundle(msgspec.Struct, rename="camel"):
    resource_type: str
    type: str | None = None
    entry: list[_ResponseEntry] = []


_RESPONSE_TYPES = ("batch-response", "transaction-response", None)
_response_bundle = msgspec.json.Decoder(_ResponseBundle)


def parse_response_bundle(body: bytes, count: int) -> list[EntryResponse]:
    """Return the response to each entry, in the order of the request.

    Raises ValueError if ``body`` is not a Bundle of responses in JSON, or if it does not have ``count`` entries.
    """
    try:
        bundle = _response_bundle.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("not a Bundle in JSON") from None
    if bundle.resource_type != "Bundle" or bundle.type not in _RESPONSE_TYPES or len(bundle.entry) != count:
        raise ValueError("not a Bundle with as many entries as were sent")
    return [
        EntryResponse(
            EntryResult(_parse_status(entry.response.status), bytes(entry.response.outcome)),
            bytes(entry.resource),
            entry.response.location or "",
            entry.response.etag or "",
        )
        for entry in bundle.entry
    ]


def find_references(body: bytes) -> set[ReferenceTarget]:
    """Return the targets of the ``Type/id`` references of a resource: resources of the same server."""
    targets: set[ReferenceTarget] = set()

    def collect(reference: dict[str, Any], target: ReferenceTarget) -> None:
        targets.add(target)

    with suppress(orjson.JSONDecodeError):
        _visit_references(orjson.loads(body), collect)
    return targets


def remove_references(body: bytes, targets: Collection[ReferenceTarget]) -> bytes:
    """Return the resource without its references to ``targets``.

    The types and displays of the references remain, so that the resource stays valid. The result is meant to be
    replaced once the targets exist on the server: its decimals may lose trailing zeros.
    """
    resource = orjson.loads(body)

    def remove(reference: dict[str, Any], target: ReferenceTarget) -> None:
        if target in targets:
            del reference["reference"]
            reference.setdefault("type", target[0])

    _visit_references(resource, remove)
    return orjson.dumps(resource)


def has_same_content(sent: bytes, stored: bytes) -> bool:
    """Return whether a server stored exactly the resource that was sent.

    ``meta.versionId``, ``meta.lastUpdated`` and, unless it was sent, ``meta.source`` are ignored: the server sets them.
    Numbers are compared digit by digit: 1.0 and 1.00 differ in FHIR.
    """
    try:
        sent_resource, stored_resource = _exact.decode(sent), _exact.decode(stored)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    if not isinstance(sent_resource, dict) or not isinstance(stored_resource, dict):
        return False
    meta = sent_resource.pop("meta", None) or {}
    ignored = _SERVER_META if "source" in meta else (*_SERVER_META, "source")
    sent_meta = {name: value for name, value in meta.items() if name not in ignored}
    stored_meta = {
        name: value for name, value in (stored_resource.pop("meta", None) or {}).items() if name not in ignored
    }
    return bool(sent_resource == stored_resource and sent_meta == stored_meta)


def sort_types(resource_types: Iterable[str]) -> list[str]:
    """Return the types in load order: the order of the catalog, where the targets of references come first."""
    return sorted(resource_types, key=lambda name: (LOAD_ORDER.get(name, len(LOAD_ORDER)), name))


def _visit_references(value: Any, visit: Callable[[dict[str, Any], ReferenceTarget], None]) -> None:
    if isinstance(value, dict):
        reference = value.get("reference")
        if isinstance(reference, str):
            resource_type, _, rest = reference.partition("/")
            resource_id = rest.partition("/")[0]
            if resource_type[:1].isupper() and resource_type.isalpha() and resource_id:
                visit(value, (resource_type, resource_id))
        for member in value.values():
            _visit_references(member, visit)
    elif isinstance(value, list):
        for item in value:
            _visit_references(item, visit)


def _is_resource(body: bytes, entry: BundleEntry) -> bool:
    try:
        header = _header.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return header.resource_type == entry.resource_type and header.id == entry.id


def _parse_status(text: str) -> int:
    digits = text.strip()[:3]
    return int(digits) if digits.isdecimal() else 0


def _keep_digits(text: str) -> tuple[str]:
    """Return a decimal as its text, in a tuple: no JSON value decodes to a tuple."""
    return (text,)


class _Header(msgspec.Struct, rename="camel"):
    resource_type: str
    id: str | None = None


_header = msgspec.json.Decoder(_Header)

_exact: msgspec.json.Decoder[Any] = msgspec.json.Decoder(float_hook=_keep_digits)
