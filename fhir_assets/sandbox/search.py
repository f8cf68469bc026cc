"""FHIR search on the store: parsing of parameters, matching, and rendering of pages as Bundles."""

import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

import orjson

from fhir_assets.sandbox.dates import FAR_FUTURE, TimeRange, compare, instant
from fhir_assets.sandbox.faults import Fault, FaultKind
from fhir_assets.sandbox.memory import Store, Version
from fhir_assets.sandbox.outcomes import Refusal, build_operation_outcome
from fhir_assets.sandbox.parameters import EXTRACTORS, index_key, list_parameters

Query = Sequence[tuple[str, str]]

MAX_COUNT = 10_000
_DEFAULT_COUNT = 50
_SORTS = ("_lastUpdated", "-_lastUpdated", "_id", "-_id")
_IGNORED = {"_format", "_pretty"}
_ALWAYS = TimeRange(-FAR_FUTURE, FAR_FUTURE)


@dataclass(slots=True)
class Search:
    """A parsed search. ``unknown`` contains the parameters that the server ignores."""

    count: int = _DEFAULT_COUNT
    total: bool = True
    only_count: bool = False
    sort: str | None = None
    time_range: TimeRange = _ALWAYS
    ids: set[str] | None = None
    tokens: list[tuple[str, list[str]]] = field(default_factory=list)
    include_patients: bool = False
    unknown: list[str] = field(default_factory=list)


def parse_search(resource_type: str, query: Query, *, strict: bool) -> Search:
    """Parse the parameters of a search. Raises Refusal for malformed and, if ``strict``, for unknown parameters."""
    search = Search()
    plain = list_parameters(resource_type)
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
                search.time_range = _intersect(search.time_range, value)
            case "_id":
                ids = set(value.split(","))
                search.ids = ids if search.ids is None else search.ids & ids
            case "_include" if value in (f"{resource_type}:patient", f"{resource_type}:subject"):
                search.include_patients = True
            case _ if name in plain:
                search.tokens.append((name, [index_key(name, item) for item in value.split(",")]))
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


def _intersect(time_range: TimeRange, value: str) -> TimeRange:
    try:
        other = compare(value)
    except ValueError as error:
        raise Refusal(400, "invalid", f"_lastUpdated is {error}") from None
    return TimeRange(max(time_range.start, other.start), min(time_range.end, other.end))


def find_matches(store: Store, resource_type: str, search: Search) -> list[Version]:
    """Return the matching resources in the requested order."""
    type_store = store.type_store(resource_type)
    ids: set[str] | None = search.ids
    for name, keys in search.tokens:
        ids_of_keys = type_store.find_ids(name, keys)
        ids = set(ids_of_keys) if ids is None else ids & ids_of_keys.keys()
    time_range = search.time_range
    if ids is None:
        versions = type_store.find_updated_in(time_range) if time_range.start < time_range.end else []
    else:
        latest = (type_store.latest.get(resource_id) for resource_id in ids)
        versions = sorted(
            (v for v in latest if v is not None and v.body and time_range.start <= v.when < time_range.end),
            key=lambda version: (version.when, version.id),
        )
    if search.sort in ("_id", "-_id"):
        versions.sort(key=lambda version: version.id)
    if search.sort is not None and search.sort.startswith("-"):
        versions.reverse()
    return versions


def find_patients(store: Store, page: Sequence[Version]) -> list[Version]:
    """Return the resources that the patient or subject elements of a page refer to, without duplicates."""
    keys = {key: None for version in page for key in EXTRACTORS["patient"](orjson.loads(version.body))}
    targets = (store.latest(*key.split("/", 1)) for key in keys if "/" in key)
    return [version for version in targets if version is not None and version.body]


@dataclass(frozen=True, slots=True)
class Listing:
    """The result of a search or a history, paged on demand. It is a snapshot: later writes do not change it."""

    kind: str
    self_link: str
    versions: Sequence[Version]
    count: int
    total: int | None
    outcome: bytes | None = None
    include: Callable[[Sequence[Version]], Sequence[Version]] = lambda page: ()


@dataclass(frozen=True, slots=True)
class _PagePosition:
    listing: Listing
    offset: int
    expires: float


class Pages:
    """The valid next links: opaque, unguessable tokens that expire after ``lifetime`` seconds."""

    def __init__(self, clock: Callable[[], float], lifetime: float = 600, at_most: int = 20_000) -> None:
        self._clock = clock
        self._lifetime = lifetime
        self._at_most = at_most
        self._positions: OrderedDict[str, _PagePosition] = OrderedDict()

    def link(self, listing: Listing, offset: int) -> str:
        """Return a token for the page of ``listing`` that begins at ``offset``."""
        token = secrets.token_urlsafe(18)
        self._positions[token] = _PagePosition(listing, offset, self._clock() + self._lifetime)
        while len(self._positions) > self._at_most or (len(self._positions) > 1 and self._oldest_expired()):
            self._positions.popitem(last=False)
        return token

    def get(self, token: str) -> tuple[Listing, int]:
        """Return the listing and the offset of a token. Raises Refusal 410 if it has expired or never existed."""
        position = self._positions.get(token)
        if position is None or position.expires < self._clock():
            raise build_expired_refusal(410)
        return position.listing, position.offset

    def expire(self, token: str) -> None:
        """Expire a next link."""
        self._positions.pop(token, None)

    def _oldest_expired(self) -> bool:
        return next(iter(self._positions.values())).expires < self._clock()


def build_expired_refusal(status: int) -> Refusal:
    """Return the error of an expired next link."""
    return Refusal(status, "not-found", "This page of the search has expired: search again")


def build_unknown_parameters_outcome(names: Sequence[str]) -> bytes:
    """Return the OperationOutcome that names ignored parameters."""
    text = f"Unknown search parameters were ignored: {', '.join(names)}"
    return orjson.dumps(build_operation_outcome("warning", "not-supported", text))


def render_page(base: str, listing: Listing, offset: int, pages: Pages, faults: dict[FaultKind, Fault]) -> bytes:
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
    path = f"{version.resource_type}/{version.id}".encode()
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
        path,
        b"" if version.deleted else b',"resource":' + version.body,
        method,
        version.resource_type.encode() if method == b"POST" else path,
        status,
        version.version_id.encode(),
        instant(version.when).encode(),
    )
