"""Bundles that write: how they are made, what their answers say, and in which order resources can be sent.

See https://hl7.org/fhir/R4/http.html#transaction. Pure: no HTTP here.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import orjson

from fhir_assets.catalog import LOAD_ORDER
from fhir_assets.fhir.outcome import summarize_issues

BundleType = Literal["batch", "transaction"]
ReferenceTarget = tuple[str, str]
"""Type and id of a resource that is referred to."""

_PASSING = frozenset({408, 409, 412, 423, 425, 429})
_NEVER = frozenset({501, 505})
_MARKS_OF_A_SERVER = ("versionId", "lastUpdated")


@dataclass(frozen=True, slots=True)
class BundleEntry:
    """A resource to put under its own id: its bytes as they came, and where they came from (``Patient.ndjson:3``)."""

    resource_type: str
    id: str
    body: bytes
    place: str = ""

    @property
    def url(self) -> str:
        """Where it is put, below the server's base."""
        return f"{self.resource_type}/{self.id}"


@dataclass(frozen=True, slots=True)
class EntryResult:
    """What became of one entry: the HTTP status (0: the server gave none) and the OperationOutcome, if any."""

    status: int
    outcome: bytes = b""

    @property
    def accepted(self) -> bool:
        """Whether the server has it now."""
        return 200 <= self.status < 300

    @property
    def retryable(self) -> bool:
        """Whether the same entry may be accepted a little later."""
        return self.status in _PASSING or (self.status >= 500 and self.status not in _NEVER) or self.status == 0

    @property
    def reason(self) -> str:
        """Why it was refused, without patient data: status, and codes and places of the issues, never their texts."""
        said = f"the server answered {self.status}" if self.status else "the server gave no answer for it"
        found = summarize_issues(self.outcome)
        return f"{said}: {', '.join(found)}" if found else said


def build_put_bundle(kind: BundleType, base_url: str, entries: Iterable[BundleEntry]) -> bytes:
    """A Bundle that puts each resource under its id. The resources' bytes stay as they are."""
    return _bundle(
        kind,
        (
            b'{"fullUrl":%b,"resource":%b,"request":{"method":"PUT","url":%b}}'
            % (orjson.dumps(f"{base_url}/{entry.url}"), entry.body, orjson.dumps(entry.url))
            for entry in entries
        ),
    )


def build_get_bundle(entries: Iterable[BundleEntry]) -> bytes:
    """A batch that asks for the resources that stand under the same ids now."""
    return _bundle("batch", (b'{"request":{"method":"GET","url":%b}}' % orjson.dumps(each.url) for each in entries))


def _bundle(kind: BundleType, entries: Iterator[bytes]) -> bytes:
    return b'{"resourceType":"Bundle","type":"%b","entry":[%b]}' % (kind.encode(), b",".join(entries))


class _Response(msgspec.Struct):
    status: str = ""
    outcome: msgspec.Raw = msgspec.Raw(b"")


class _Answered(msgspec.Struct):
    response: _Response = msgspec.field(default_factory=_Response)
    resource: msgspec.Raw = msgspec.Raw(b"")


class _Answer(msgspec.Struct):
    resourceType: str  # noqa: N815
    entry: list[_Answered] = []


_answer = msgspec.json.Decoder(_Answer)


def parse_response_bundle(body: bytes, count: int) -> list[tuple[EntryResult, bytes]]:
    """The result of each entry, in the order they were sent, and the resource if the answer holds it.

    Raises ValueError for what is no Bundle in whole JSON, or has not ``count`` entries.
    """
    try:
        answer = _answer.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("not a Bundle in JSON") from None
    if answer.resourceType != "Bundle" or len(answer.entry) != count:
        raise ValueError("not a Bundle with as many entries as were sent")
    return [
        (EntryResult(_status(each.response.status), bytes(each.response.outcome)), bytes(each.resource))
        for each in answer.entry
    ]


def find_references(body: bytes) -> set[ReferenceTarget]:
    """The resources of the same server that a resource refers to: the targets of its ``Type/id`` references."""
    found: set[ReferenceTarget] = set()

    def collect(reference: dict[str, Any], target: ReferenceTarget) -> None:
        found.add(target)

    with suppress(orjson.JSONDecodeError):
        _each_reference(orjson.loads(body), collect)
    return found


def remove_references(body: bytes, targets: Collection[ReferenceTarget]) -> bytes:
    """The resource without its references to ``targets``: their types and displays remain, so it is valid still.

    For a first pass only, before those resources are there: numbers may lose trailing zeros.
    """
    resource = orjson.loads(body)

    def take_out(reference: dict[str, Any], target: ReferenceTarget) -> None:
        if target in targets:
            del reference["reference"]
            reference.setdefault("type", target[0])

    _each_reference(resource, take_out)
    return orjson.dumps(resource)


def has_same_content(sent: bytes, stored: bytes) -> bool:
    """Whether a server holds just this: the same but for version, time and source that the server sets itself.

    Numbers are compared digit by digit: 1.0 and 1.00 differ in FHIR.
    """
    try:
        ours, theirs = _exact.decode(sent), _exact.decode(stored)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return False
    meta = ours.pop("meta", None) or {}
    marks = _MARKS_OF_A_SERVER if "source" in meta else (*_MARKS_OF_A_SERVER, "source")
    given = {name: value for name, value in meta.items() if name not in marks}
    kept = {name: value for name, value in (theirs.pop("meta", None) or {}).items() if name not in marks}
    return bool(ours == theirs and given == kept)


def sort_types(resource_types: Iterable[str]) -> list[str]:
    """The types as they are sent: in the catalog's order, where what is referred to mostly comes first; then others."""
    return sorted(resource_types, key=lambda name: (LOAD_ORDER.get(name, len(LOAD_ORDER)), name))


def _each_reference(value: Any, visit: Callable[[dict[str, Any], ReferenceTarget], None]) -> None:
    if isinstance(value, dict):
        reference = value.get("reference")
        if isinstance(reference, str):
            resource_type, _, rest = reference.partition("/")
            identity = rest.partition("/")[0]
            if resource_type[:1].isupper() and resource_type.isalpha() and identity:
                visit(value, (resource_type, identity))
        for each in value.values():
            _each_reference(each, visit)
    elif isinstance(value, list):
        for each in value:
            _each_reference(each, visit)


def _status(text: str) -> int:
    digits = text.strip()[:3]
    return int(digits) if digits.isdecimal() else 0


def _digits(text: str) -> tuple[str]:
    """A decimal as its text; a tuple, which no JSON value decodes to."""
    return (text,)


_exact: msgspec.json.Decoder[Any] = msgspec.json.Decoder(float_hook=_digits)
