"""FHIR search on the store: parses parameters, finds matches, and renders pages as Bundles."""

import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

import orjson

from fhir_assets.sandbox.dates import FAR_FUTURE, Stretch, compare, instant
from fhir_assets.sandbox.faults import Fault, FaultKind
from fhir_assets.sandbox.memory import Store, Version
from fhir_assets.sandbox.outcomes import Refusal, operation_outcome
from fhir_assets.sandbox.parameters import EXTRACT, key_of, offered

Query = Sequence[tuple[str, str]]

MAX_COUNT = 10_000
_DEFAULT_COUNT = 50
_SORTS = ("_lastUpdated", "-_lastUpdated", "_id", "-_id")
_IGNORED = {"_format", "_pretty"}
_ALWAYS = Stretch(-FAR_FUTURE, FAR_FUTURE)


@dataclass(slots=True)
class Search:
    """A parsed search. ``unknown`` contains the parameters that the server ignores."""

    count: int = _DEFAULT_COUNT
    total: bool = True
    only_count: bool = False
    sort: str | None = None
    stretch: Stretch = _ALWAYS
    ids: set[str] | None = None
    tokens: list[tuple[str, list[str]]] = field(default_factory=list)
    include_patients: bool = False
    unknown: list[str] = field(default_factory=list)


def parse(resource_type: str, query: Query, *, strict: bool) -> Search:
    """Parse the parameters of a search. Raises Refusal for a malformed one and, if ``strict``, for an unknown one."""
    search = Search()
    plain = offered(resource_type)
    for name, value in query:
        match name:
            case "_count":
                search.count = _parse_count(value)
            case "_summary" if value == "count":
                search.only_count = True
            case "_total" if value in ("none", "estimate", "accurate"):
                search.total = value != "none"
            case "_sort" if value in _SORTS:
                search.sort = value
            case "_lastUpdated":
                search.stretch = _narrow(search.stretch, value)
            case "_id":
                ids = set(value.split(","))
                search.ids = ids if search.ids is None else search.ids & ids
            case "_include" if value in (f"{resource_type}:patient", f"{resource_type}:subject"):
                search.include_patients = True
            case _ if name in plain:
                search.tokens.append((name, [key_of(name, one) for one in value.split(",")]))
            case _ if name not in _IGNORED:
                search.unknown.append(name)
    if search.unknown and strict:
        raise Refusal(400, "not-supported", f"Unknown search parameters: {', '.join(search.unknown)}")
    search.only_count = search.only_count or search.count == 0
    return search


def _parse_count(value: str) -> int:
    if not value.isdecimal():
        raise Refusal(400, "invalid", "_count is not a whole number")
    return min(int(value), MAX_COUNT)


def _narrow(stretch: Stretch, value: str) -> Stretch:
    try:
        other = compare(value)
    except ValueError as error:
        raise Refusal(400, "invalid", f"_lastUpdated is {error}") from None
    return Stretch(max(stretch.start, other.start), min(stretch.end, other.end))


def matches(store: Store, resource_type: str, search: Search) -> list[Version]:
    """Return the matching resources in the requested order."""
    shelf = store.shelf(resource_type)
    ids: set[str] | None = search.ids
    for name, keys in search.tokens:
        found = shelf.where(name, keys)
        ids = set(found) if ids is None else ids & found.keys()
    stretch = search.stretch
    if ids is None:
        found_versions = shelf.between(stretch) if stretch.start < stretch.end else []
    else:
        latest = (shelf.latest.get(resource_id) for resource_id in ids)
        found_versions = sorted(
            (v for v in latest if v is not None and v.body and stretch.start <= v.when < stretch.end),
            key=lambda version: (version.when, version.id),
        )
    if search.sort in ("_id", "-_id"):
        found_versions.sort(key=lambda version: version.id)
    if search.sort is not None and search.sort.startswith("-"):
        found_versions.reverse()
    return found_versions


def patients_of(store: Store, page: Sequence[Version]) -> list[Version]:
    """Return the resources that the patient or subject elements of a page refer to, without duplicates."""
    keys = {key: None for version in page for key in EXTRACT["patient"](orjson.loads(version.body))}
    targets = (store.latest(*key.split("/", 1)) for key in keys if "/" in key)
    return [version for version in targets if version is not None and version.body]


@dataclass(frozen=True, slots=True)
class Listing:
    """The result of a search or a history, paged on demand. A snapshot: later writes do not change it."""

    kind: str
    self_link: str
    versions: Sequence[Version]
    count: int
    total: int | None
    outcome: bytes | None = None
    include: Callable[[Sequence[Version]], Sequence[Version]] = lambda page: ()


@dataclass(frozen=True, slots=True)
class _Place:
    listing: Listing
    offset: int
    expires: float


class Pages:
    """The next links in use: opaque, unguessable, and valid for ``lifetime`` seconds."""

    def __init__(self, clock: Callable[[], float], lifetime: float = 600, at_most: int = 20_000) -> None:
        self._clock = clock
        self._lifetime = lifetime
        self._at_most = at_most
        self._places: OrderedDict[str, _Place] = OrderedDict()

    def link(self, listing: Listing, offset: int) -> str:
        """Return a token for the page of ``listing`` that begins at ``offset``."""
        token = secrets.token_urlsafe(18)
        self._places[token] = _Place(listing, offset, self._clock() + self._lifetime)
        while len(self._places) > self._at_most or (len(self._places) > 1 and self._oldest_expired()):
            self._places.popitem(last=False)
        return token

    def at(self, token: str) -> tuple[Listing, int]:
        """Return the page of a token. Raises Refusal 410 if it expired or never existed."""
        place = self._places.get(token)
        if place is None or place.expires < self._clock():
            raise expired(410)
        return place.listing, place.offset

    def expire(self, token: str) -> None:
        """Expire a next link."""
        self._places.pop(token, None)

    def _oldest_expired(self) -> bool:
        return next(iter(self._places.values())).expires < self._clock()


def expired(status: int) -> Refusal:
    """Return the error of an expired next link."""
    return Refusal(status, "not-found", "This page of the search has expired: search again")


def unknown_outcome(names: Sequence[str]) -> bytes:
    """Return the OperationOutcome that names ignored parameters."""
    text = f"Unknown search parameters were ignored: {', '.join(names)}"
    return orjson.dumps(operation_outcome("warning", "not-supported", text))


def render(base: str, listing: Listing, offset: int, pages: Pages, faults: dict[FaultKind, Fault]) -> bytes:
    """Return one page of a listing as a Bundle, with resources byte for byte as stored."""
    start = offset
    if FaultKind.LOSE_PAGE in faults:
        start += listing.count
    end = start + listing.count
    page = listing.versions[start:end]
    if FaultKind.DUPLICATE in faults and offset:
        page = [listing.versions[offset - 1], *page]
    links = [(b"self", listing.self_link.encode())]
    if end < len(listing.versions):
        links.append((b"next", f"{base}?_page={quote(pages.link(listing, end))}".encode()))
    total = listing.total
    if total is not None and FaultKind.WRONG_TOTAL in faults:
        total += faults[FaultKind.WRONG_TOTAL].by
    to_entry = _history_entry if listing.kind == "history" else _match_entry
    entries = [to_entry(base.encode(), version) for version in page]
    entries += [_match_entry(base.encode(), version, b"include") for version in listing.include(page)]
    if listing.outcome is not None and offset == 0:
        entries.append(b'{"resource":%b,"search":{"mode":"outcome"}}' % listing.outcome)
    return b'{"resourceType":"Bundle","type":"%b"%b,"link":[%b]%b}' % (
        listing.kind.encode(),
        b"" if total is None else b',"total":%d' % total,
        b",".join(b'{"relation":"%b","url":%b}' % (name, orjson.dumps(url.decode())) for name, url in links),
        b',"entry":[%b]' % b",".join(entries) if entries else b"",
    )


def _match_entry(base: bytes, version: Version, mode: bytes = b"match") -> bytes:
    return b'{"fullUrl":"%b/%b/%b","resource":%b,"search":{"mode":"%b"}}' % (
        base,
        version.resource_type.encode(),
        version.id.encode(),
        version.body,
        mode,
    )


def _history_entry(base: bytes, version: Version) -> bytes:
    place = f"{version.resource_type}/{version.id}".encode()
    if version.deleted:
        method, status = b"DELETE", b"204 No Content"
    elif version.previous is None:
        method, status = b"POST", b"201 Created"
    else:
        method, status = b"PUT", b"200 OK"
    return (
        b'{"fullUrl":"%b/%b"%b,"request":{"method":"%b","url":"%b"},'
        b'"response":{"status":"%b","etag":"W/\\"%b\\"","lastModified":"%b"}}'
    ) % (
        base,
        place,
        b"" if version.deleted else b',"resource":' + version.body,
        method,
        version.resource_type.encode() if method == b"POST" else place,
        status,
        version.version_id.encode(),
        instant(version.when).encode(),
    )
