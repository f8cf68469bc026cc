"""Containers: Bundles of every type and Parameters, and the resources in their entries, at any depth.

See https://hl7.org/fhir/R4/bundle.html and https://hl7.org/fhir/R4/parameters.html. A container is not loaded itself.
Its resources are loaded as if each of them had been received alone, after their references were resolved by
``full_urls``. The envelope is read leniently, the resources are not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from fhir_assets.fhir.deletions import (
    DeletionTimes,
    EntryRequest,
    EntryResponse,
    HistoryEntry,
    Target,
    is_deletion,
)
from fhir_assets.fhir.full_urls import FullUrls, derive_id
from fhir_assets.fhir.half_surrogates import mask_half_surrogates, unmask
from fhir_assets.fhir.outcome import summarize_issues
from fhir_assets.fhir.record import Deletion, MalformedResource, parse_instant, read_header, to_single_line

CONTAINERS = frozenset({"Bundle", "Parameters"})
"""The types whose resources are loaded instead of themselves."""

MAX_DEPTH = 16
"""The maximum nesting of containers."""


class Entry(msgspec.Struct, rename="camel"):
    """An entry of a Bundle, or a parameter of Parameters. ``resource`` is ``null`` if it has none."""

    full_url: str | None = None
    resource: msgspec.Raw = msgspec.Raw(b"null")
    request: EntryRequest | None = None
    response: EntryResponse | None = None
    part: list[msgspec.Raw] | None = None

    @property
    def method(self) -> str:
        """The HTTP method that the entry requests; empty if it requests none."""
        return self.request.method if self.request else ""

    @property
    def is_deletion(self) -> bool:
        """Whether the entry requests or reports a deletion."""
        return is_deletion(self.request, self.response)


@dataclass(frozen=True, slots=True)
class ContainedResource:
    """A resource of a container, with its id and with resolved references. ``location`` is its place in the file."""

    location: str
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class DeleteEntry:
    """An entry that requests or reports the deletion of a resource.

    ``moment`` is the time of the entry, of its neighbours in a history or of its Bundle, None if there is none.
    """

    location: str
    target: Target
    moment: datetime | None


@dataclass(frozen=True, slots=True)
class UnusableEntry:
    """A part of a container that cannot be used: the violated rule, and a message without patient data."""

    location: str
    rule: str
    message: str
    body: bytes = field(default=b"", repr=False)


Part = ContainedResource | DeleteEntry | UnusableEntry


class _Bundle(msgspec.Struct, rename="camel"):
    resource_type: str = ""
    timestamp: Any = None
    meta: Any = None
    entry: list[msgspec.Raw] | None = None
    parameter: list[msgspec.Raw] | None = None
    link: Any = None


_decode_bundle = msgspec.json.Decoder(_Bundle).decode
_decode_entry = msgspec.json.Decoder(Entry).decode
_decode_history_entry = msgspec.json.Decoder(HistoryEntry).decode
_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_NO_TIME = datetime.min.replace(tzinfo=UTC)
_HALF = (
    "a page of a search or a history whose next link points to resources that the file does not contain. The resources "
    "of this page are loaded: give all pages in one file, or have the server searched instead"
)


class Pages:
    """The links of the Bundles of one file.

    A next link is unfollowed if no other page of the file has it as its self link.
    """

    def __init__(self) -> None:
        self._next: dict[str, str] = {}
        self._seen: set[str] = set()

    def add(self, links: Mapping[str, str], location: str) -> None:
        """Add the links of a Bundle at ``location``: URLs by relation."""
        own, following = _normalize(links.get("self")), _normalize(links.get("next"))
        self._next.pop(own, None)
        if own:
            self._seen.add(own)
        if following and following not in self._seen:
            self._next[following] = location

    def unfollowed(self) -> Iterator[UnusableEntry]:
        """Yield the pages of the file whose next page is missing."""
        for location in self._next.values():
            yield UnusableEntry(f"{location}.link", "incomplete", _HALF)


def unpack(body: bytes, location: str, pages: Pages, *, depth: int = 0) -> Iterator[Part]:
    """Yield what a container in JSON contains. ``location`` is its place in the file, ``""`` for the whole file."""
    masked = mask_half_surrogates(body)
    try:
        bundle = _decode_bundle(masked)
    except _ERRORS:
        yield UnusableEntry(location or "document", "structure", "not a valid Bundle", body)
        return
    if depth >= MAX_DEPTH:
        yield UnusableEntry(location, "structure", f"containers are nested more than {MAX_DEPTH} levels deep", body)
        return
    is_bundle = bundle.resource_type == "Bundle"
    name = "entry" if is_bundle else "parameter"
    entries = (bundle.entry if is_bundle else bundle.parameter) or []
    reader = EntryReader(pages, read_timestamp(bundle.timestamp), depth=depth)
    decoded = [(entry, decode_entry(entry)) for entry in unmask(body, masked, entries)]
    for _, entry in decoded:
        reader.note(entry)
    prefix = f"{location}." if location else ""
    found = is_bundle
    for number, (raw, entry) in enumerate(decoded):
        for part in reader.read(raw, entry, f"{prefix}{name}[{number}]"):
            found = True
            yield part
    yield from reader.finish(_read_bundle_time(bundle))
    if not found:
        yield ContainedResource(location or "document", body)  # Parameters of an operation, which carry no resource
    pages.add(_read_links(bundle.link), location or "document")


class _HistoryDeletions:
    """Reads the deletions of one container. A deletion in a history may get its time from the neighbouring entries."""

    def __init__(self, bundle_time: datetime | None) -> None:
        self._bundle_time = bundle_time
        self._times = DeletionTimes(latest=None, fallback=_NO_TIME)
        self._previous: bytes | None = None
        self._has_undated = False

    def read_deletion(self, body: bytes, location: str) -> Iterator[DeleteEntry | UnusableEntry]:
        """Yield the deletion of an entry, and earlier ones whose time is now known. ``body`` is the entry."""
        try:
            entry = _decode_history_entry(body)
        except _ERRORS:
            yield UnusableEntry(location, "structure", "a deletion that is not a valid Bundle entry", body)
            return
        target = entry.target
        if target is None or (entry.response is None and target.version_id is not None):
            message = "a DELETE that does not name a single resource as <type>/<id>"
            yield UnusableEntry(location, "structure", message, body)
        elif entry.response is None or entry.moment is not None:
            if self._has_undated and entry.moment is not None:
                yield from self._to_entries(self._times.add_version(None, entry.moment))
            self._previous = body
            yield DeleteEntry(location, target, entry.moment or self._bundle_time)
        else:
            if not self._has_undated:
                self._has_undated = True
                yield from self._add_neighbour(self._previous)
            yield from self._to_entries(self._times.add_deletion(target, None))

    def read_version(self, body: bytes) -> Iterator[DeleteEntry]:
        """Record an entry with a version of a resource, and yield the deletions whose time is now known."""
        if self._has_undated:
            yield from self._add_neighbour(body)
        self._previous = body

    def finish(self, bundle_time: datetime | None) -> Iterator[DeleteEntry]:
        """Yield the deletions that have no older neighbour."""
        yield from self._to_entries(self._times.finish(bundle_time or self._bundle_time))

    def _add_neighbour(self, body: bytes | None) -> Iterator[DeleteEntry]:
        """Add an entry, which may be the neighbour of undated deletions. The time of a malformed entry is unknown."""
        with suppress(*_ERRORS):
            if body is not None and (entry := _decode_history_entry(body)).moment is not None:
                target = None if entry.is_deletion else entry.target
                yield from self._to_entries(self._times.add_version(target, entry.moment))

    def _to_entries(self, deletions: Iterable[Deletion]) -> Iterator[DeleteEntry]:
        for deletion in deletions:
            target = Target(deletion.resource_type, deletion.id, deletion.version_id)
            yield DeleteEntry("history", target, None if deletion.at == _NO_TIME else deletion.at)


class EntryReader:
    """Reads the entries of one container: ``note`` each of them, then ``read`` each of them.

    If a container is too large to note all entries first, ``look_ahead`` yields its entries; it is called once, when an
    entry has a reference that the entries noted so far do not resolve.
    """

    def __init__(
        self,
        pages: Pages,
        bundle_time: datetime | None,
        *,
        depth: int = 0,
        look_ahead: Callable[[], Iterable[bytes]] | None = None,
    ) -> None:
        self._pages = pages
        self._deletions = _HistoryDeletions(bundle_time)
        self._depth = depth
        self._look_ahead = look_ahead
        self._full_urls = FullUrls()

    def note(self, entry: Entry | None) -> None:
        """Record the full URL of an entry, so that references to the entry can be resolved."""
        if entry is None or entry.full_url is None or bytes(entry.resource) == b"null":
            return
        try:
            header = read_header(bytes(entry.resource))
        except MalformedResource:
            return
        resource_id = header.id or derive_id(entry.full_url)
        if resource_id and header.resource_type not in CONTAINERS:
            self._full_urls.add(entry.full_url, header.resource_type, resource_id)

    def read(self, body: bytes, entry: Entry | None, location: str) -> Iterator[Part]:
        """Yield what an entry contains. ``entry`` is ``decode_entry(body)``."""
        if entry is None:
            yield UnusableEntry(location, "json", "not JSON, or not a valid Bundle entry", body)
            return
        if entry.is_deletion:
            yield from self._deletions.read_deletion(body, location)
            return
        if entry.response is not None:
            yield from self._deletions.read_version(body)
        if problem := _find_problem(entry):
            yield UnusableEntry(location, "incomplete", problem, body)
        elif bytes(entry.resource) != b"null":
            yield from self._read_resource(entry, location)
        for number, part in enumerate(entry.part or ()):
            yield from self.read(bytes(part), decode_entry(bytes(part)), f"{location}.part[{number}]")

    def finish(self, bundle_time: datetime | None) -> Iterator[Part]:
        """Yield the deletions whose time is known only at the end of the container."""
        yield from self._deletions.finish(bundle_time)

    def _read_resource(self, entry: Entry, location: str) -> Iterator[Part]:
        body = to_single_line(bytes(entry.resource))
        try:
            header = read_header(body)
        except MalformedResource as error:
            yield UnusableEntry(location, error.rule, str(error), body)
            return
        if header.resource_type in CONTAINERS:
            for part in unpack(body, f"{location}.resource", self._pages, depth=self._depth + 1):
                yield self._resolve(part) if isinstance(part, ContainedResource) else part
            return
        if header.id is None:
            put_url = entry.request.url if entry.request and entry.method == "PUT" else None
            body = insert_id(body, derive_id(entry.full_url, put_url))
        yield self._resolve(ContainedResource(location, body))

    def _resolve(self, part: ContainedResource) -> ContainedResource:
        body, unknown = self._full_urls.resolve(part.body)
        if unknown and self._look_ahead is not None:
            for entry in self._look_ahead():
                self.note(decode_entry(entry))
            self._look_ahead = None
            body, _ = self._full_urls.resolve(part.body)
        return part if body is part.body else ContainedResource(part.location, body)


def decode_entry(body: bytes) -> Entry | None:
    """Return an entry of a container, None if it is not a valid one."""
    try:
        return _decode_entry(body)
    except _ERRORS:
        return None


def insert_id(body: bytes, resource_id: str | None) -> bytes:
    """Return a resource on one line with an id; unchanged if the id is None."""
    if resource_id is None or body[:1] != b"{":
        return body
    return b'{"id":%b,%b' % (msgspec.json.encode(resource_id), body[1:].lstrip())


def read_timestamp(value: object) -> datetime | None:
    """Return the timestamp of a Bundle, None if it is absent or malformed."""
    return parse_instant(value) if isinstance(value, str) else None


def read_bundle_time(body: bytes) -> datetime | None:
    """Return ``Bundle.timestamp`` of a Bundle in JSON, else ``meta.lastUpdated``; None if it has neither."""
    try:
        return _read_bundle_time(_decode_bundle(body))
    except _ERRORS:
        return None


def _read_bundle_time(bundle: _Bundle) -> datetime | None:
    meta = bundle.meta if isinstance(bundle.meta, dict) else {}
    return read_timestamp(bundle.timestamp) or read_timestamp(meta.get("lastUpdated"))


def _find_problem(entry: Entry) -> str | None:
    """Return why an entry lacks the resource that it should contain, or None."""
    missing = bytes(entry.resource) == b"null"
    if entry.method == "PATCH":
        return "a PATCH: only whole resources can be received, so the change that it describes is not in the tables"
    if entry.method in ("PUT", "POST") and missing and not (entry.response and entry.response.status):
        return f"a {entry.method} without the resource that it writes"
    outcome = bytes(entry.response.outcome) if entry.response and missing else bytes(entry.resource)
    if errors := _find_errors(outcome):
        return f"the server could not return everything that was requested ({', '.join(errors)}): ask it again"
    return None


def _find_errors(outcome: bytes) -> list[str]:
    """Return the errors of an OperationOutcome; an empty list for any other resource."""
    if b'"OperationOutcome"' not in outcome:
        return []
    try:
        decoded = msgspec.json.decode(outcome)
        if decoded["resourceType"] != "OperationOutcome":
            return []
        failed = [issue for issue in decoded["issue"] if issue.get("severity") in ("error", "fatal")]
    except (*_ERRORS, KeyError, TypeError, AttributeError):
        return []
    return (summarize_issues(msgspec.json.encode({"issue": failed})) or ["error"]) if failed else []


def read_links(body: bytes) -> dict[str, str]:
    """Return the links of a Bundle in JSON: URLs by relation."""
    try:
        return _read_links(_decode_bundle(body).link)
    except _ERRORS:
        return {}


def _normalize(url: str | None) -> str:
    """Return a URL with sorted parameters, because servers write them in any order."""
    base, _, query = (url or "").partition("?")
    return f"{base}?{'&'.join(sorted(query.split('&')))}" if query else base


def _read_links(link: Any) -> dict[str, str]:
    links = link if isinstance(link, list) else []
    return {
        link["relation"]: link["url"]
        for link in links
        if isinstance(link, dict) and isinstance(link.get("relation"), str) and isinstance(link.get("url"), str)
    }
