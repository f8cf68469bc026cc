"""The source ``search``: a FHIR server asked type by type, by ``_lastUpdated``, page after page."""

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import msgspec

from fhir_assets.errors import NotFhir, ServerUnavailable
from fhir_assets.fhir.client.http import FhirClient, FhirResponse, HttpStatusError, Params
from fhir_assets.fhir.record import (
    Deletion,
    MalformedResource,
    Record,
    RejectedInput,
    build_record,
    read_header,
    to_single_line,
)
from fhir_assets.fhir.search.page import SearchEntry, SearchPage, parse_search_page
from fhir_assets.fhir.search.seen_versions import SeenVersions
from fhir_assets.windows import Interval

T = TypeVar("T")

IDS_AT_ONCE = 50
_RESTARTS_WITHOUT_NEWS = 3
_PAGES_WITHOUT_NEWS = 1000
_TOLERANCE = timedelta(seconds=1)
"""Some servers show ``lastUpdated`` less precisely than they compare it."""
_CLOCK_SKEW = timedelta(minutes=5)
_CAPABILITIES_LAST = timedelta(minutes=10)
_TRUSTED_STEPS = 10
"""So many times in ascending order are not chance: the server sorts."""
_UNSUPPORTED = frozenset({400, 422, 501})
"""How servers refuse a parameter that they do not know."""
_ID = re.compile(r"[A-Za-z0-9\-.]{1,64}")


class PageExpired(Exception):
    """A next link is gone, as servers forget their searches."""


class SearchSource:
    """A FHIR server's resources through its search.

    ``page_size`` is ``_count``. ``included`` counts, by type, entries that a server added unasked.
    """

    name = "search"
    one_pass = False

    def __init__(
        self,
        client: FhirClient,
        *,
        page_size: int = 500,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client = client
        self._page_size = page_size
        self._now = now
        self._offered: frozenset[str] | None = None
        self._offered_until: datetime | None = None
        self.included: Counter[str] = Counter()

    def offered(self) -> frozenset[str] | None:
        """The types that can be searched, as the CapabilityStatement says; asked at most every ten minutes."""
        now = self._now()
        if self._offered_until is None or now >= self._offered_until:
            self._offered = self._client.capabilities().offers("search-type")
            self._offered_until = now + _CAPABILITIES_LAST
        return self._offered

    def state(self) -> None:
        """Nothing: a server is asked by interval."""

    def until(self, resource_types: Sequence[str], interval: Interval) -> None:
        """Nothing: what it gives reaches to now."""

    def count(self, resource_type: str, interval: Interval) -> int | None:
        """The server's own total (``_summary=count``); None if it does not give one."""
        try:
            return self._total(resource_type, _last_updated(interval))
        except HttpStatusError as refusal:
            if refusal.status not in _UNSUPPORTED:
                raise
            return None

    def extent(self, resource_types: Sequence[str]) -> Interval | None:
        """From the first resource to the last, by two sorted searches a type.

        A server that does not sort is found out by its totals; the interval is then open below and ends now, which
        no interval outlasts.
        """
        now = self._now()
        found = [each for name in resource_types if (each := self._extent(name, now))]
        if not found:
            return None
        starts = [each.start for each in found if each.start is not None]
        return Interval(min(starts) if len(starts) == len(found) else None, max(each.end for each in found))

    def fetch(self, resource_types: Sequence[str], interval: Interval) -> Iterator[Record | RejectedInput]:
        """Every version of a resource that the server gives for the interval, once.

        A page that expires restarts the search from the last time seen. Raises NotFhir if the server does not
        honour ``_lastUpdated``, or its pages have no end.
        """
        for name in resource_types:
            yield from SearchPager(self._client, name, self._page_size, self._now, self.included).within(interval)

    def fetch_ids(self, resource_type: str, ids: Sequence[str]) -> Iterator[Record | RejectedInput]:
        """The resources of those ids that the server has, asked for by the batch. Ids that no resource can have are
        not asked for.
        """
        askable = [each for each in dict.fromkeys(ids) if _ID.fullmatch(each)]
        for at in range(0, len(askable), IDS_AT_ONCE):
            batch = askable[at : at + IDS_AT_ONCE]
            yield from SearchPager(self._client, resource_type, self._page_size, self._now, self.included).by_id(batch)

    def find_deleted(self, resource_type: str, ids: Sequence[str]) -> Iterator[Deletion]:
        """Those of the ids that the server once had and deleted: it answers a read of them with 410."""
        for each in filter(_ID.fullmatch, dict.fromkeys(ids)):
            try:
                self._client.get(f"{resource_type}/{each}", lambda answer: None)
            except HttpStatusError as refusal:
                if refusal.status == 410:
                    yield Deletion(resource_type, each, self._now())
                elif refusal.status != 404:
                    raise

    def _extent(self, resource_type: str, now: datetime) -> Interval | None:
        unknown = Interval(None, now)
        try:
            first, last = self._end(resource_type, "_lastUpdated"), self._end(resource_type, "-_lastUpdated")
        except HttpStatusError as refusal:
            if refusal.status not in _UNSUPPORTED:
                raise
            return unknown
        if first is None and last is None:
            return unknown if self._total(resource_type) else None
        if isinstance(first, Record) and isinstance(last, Record) and first.last_updated and last.last_updated:
            found = Interval(first.last_updated, last.last_updated + _TOLERANCE)
            if self._total(resource_type) == self.count(resource_type, found):
                end = min(found.end, now)
                return Interval(min(first.last_updated, end), end)
        return unknown

    def _end(self, resource_type: str, sort: str) -> Record | RejectedInput | None:
        """The first resource in an order, None if there is none."""
        page = self._client.get(resource_type, parse_search_page, params=[("_sort", sort), ("_count", "1")])
        pager = SearchPager(self._client, resource_type, 1, self._now, Counter())
        return next((found for entry in page.entries if (found := pager.judge(entry, "entry"))), None)

    def _total(self, resource_type: str, params: Params = ()) -> int | None:
        return self._client.get(resource_type, parse_search_page, params=[*params, ("_summary", "count")]).total


class SearchPager:
    """What one search gives, over all its pages and restarts."""

    def __init__(
        self,
        client: FhirClient,
        resource_type: str,
        page_size: int,
        now: Callable[[], datetime],
        included: Counter[str],
    ) -> None:
        self._client = client
        self._type = resource_type
        self._count = ("_count", str(page_size))
        self._now = now
        self._included = included
        self._seen = SeenVersions()
        self._order = _Order()
        self._began: datetime | None = None

    def within(self, interval: Interval) -> Iterator[Record | RejectedInput]:
        """The resources of an interval."""

        def take(record: Record) -> bool:
            return self._belongs(record, interval)

        start = interval.start
        fruitless = 0
        while True:
            before = len(self._seen)
            params = [*_last_updated(Interval(start, interval.end)), ("_sort", "_lastUpdated"), self._count]
            try:
                yield from self._read(params, take)
                return
            except PageExpired:
                fruitless = 0 if len(self._seen) > before else fruitless + 1
                self._give_up_after(fruitless)
                start = max(filter(None, (self._order.resume, interval.start)), default=None)

    def by_id(self, ids: Sequence[str]) -> Iterator[Record | RejectedInput]:
        """The resources of some ids, no more than a URL holds."""
        wanted = frozenset(ids)

        def take(record: Record) -> bool:
            if record.id not in wanted:
                raise NotFhir(f"a search of {self._type} by _id gave others too: the server does not honour _id")
            return True

        for fruitless in range(1, _RESTARTS_WITHOUT_NEWS + 1):
            try:
                yield from self._read([("_id", ",".join(ids)), self._count], take)
                return
            except PageExpired:
                self._give_up_after(fruitless)

    def _give_up_after(self, fruitless: int) -> None:
        if fruitless >= _RESTARTS_WITHOUT_NEWS:
            raise ServerUnavailable(
                f"the pages of a search of {self._type} expire before they can be read, even after {fruitless} new "
                "searches: lower FHIR_PAGE_SIZE, or let the server keep its searches longer"
            )

    def _read(self, params: Params, take: Callable[[Record], bool]) -> Iterator[Record | RejectedInput]:
        stale = 0
        for number, page in enumerate(self._pages(params), 1):
            before = len(self._seen)
            self._began = self._began or page.date or self._now()
            for at, entry in enumerate(page.entries):
                item = self.judge(entry, f"page {number}, entry {at + 1}")
                if item is None:
                    continue
                if isinstance(item, RejectedInput):
                    if self._seen.add((item.resource_id, item.body)):
                        yield item
                elif take(item) and self._seen.add((item.id, item.version_id, item.last_updated)):
                    self._order.note(item.last_updated)
                    yield item
            stale = 0 if len(self._seen) > before else stale + 1
            if stale > _PAGES_WITHOUT_NEWS:
                raise NotFhir(f"a search of {self._type} gave {stale} pages in a row with nothing new: it has no end")

    def _pages(self, params: Params) -> Iterator[SearchPage]:
        """The pages in their order, the next one on its way while one is worked on. Raises PageExpired."""
        page = self._client.get(self._type, self._read_page, params=params)
        links = set()
        while page.next_link is not None:
            url = self._client.resolve(page.next_link, page.url)
            if hash(url) in links:
                raise NotFhir(f"the pages of a search of {self._type} run in a circle: the server's paging is broken")
            links.add(hash(url))
            following = _ahead(lambda url=url: self._client.get(url, self._read_page))  # type: ignore[misc]
            yield page
            try:
                page = following.result()
            except HttpStatusError as refusal:
                if refusal.status in (404, 410):
                    raise PageExpired from None
                raise
        yield page

    def _read_page(self, answer: FhirResponse) -> SearchPage:
        try:
            return parse_search_page(answer)
        except NotFhir as error:
            raise NotFhir(f"{self._client.base_url}/{self._type}: {error}") from None

    def judge(self, entry: SearchEntry | msgspec.Raw, place: str) -> Record | RejectedInput | None:
        """What an entry is: a match, one that cannot be used, or None for what merely accompanies the matches."""
        if isinstance(entry, msgspec.Raw):
            return self._rejected("structure", place, "an entry that has not the form of one", bytes(entry))
        if entry.mode == "outcome":
            return None
        body = to_single_line(bytes(entry.resource))
        if entry.mode == "include":
            self._included[_type_of(body)] += 1
            return None
        if not body:
            return self._rejected("structure", place, "an entry without a resource", body)
        resource_id = None
        try:
            header = read_header(body)
            resource_id = header.id
            if header.resourceType != self._type:
                if header.resourceType == "OperationOutcome" and entry.mode is None:
                    return None
                raise MalformedResource(f"a resource of another type than {self._type} among the matches", "structure")
            if not header.id:
                raise MalformedResource("a resource without an id: no server can have stored it", "structure")
            return build_record(body, header, self._now())
        except MalformedResource as error:
            return self._rejected(error.rule, place, str(error), body, resource_id)

    def _rejected(
        self, rule: str, place: str, message: str, body: bytes, resource_id: str | None = None
    ) -> RejectedInput:
        return RejectedInput(self._type, resource_id, rule, f"{self._type} search, {place}", message, self._now(), body)

    def _belongs(self, record: Record, interval: Interval) -> bool:
        """Whether a match lies in the interval. One that was updated while the search runs has left it, and comes
        with a later one. Raises NotFhir if there is no such excuse.
        """
        moment = record.last_updated
        if moment is None:
            return True
        began = self._began or self._now()
        if moment >= interval.end + _TOLERANCE and moment >= began - _CLOCK_SKEW:
            return False
        early = interval.start is not None and moment < interval.start - _TOLERANCE
        if early or moment >= interval.end + _TOLERANCE:
            raise NotFhir(
                f"{self._client.base_url}/{self._type}: the server gives resources from outside of the _lastUpdated "
                "that was asked for, so windows cannot be told apart: make _lastUpdated searchable there, or load an "
                "export with FHIR_SOURCE=ndjson"
            )
        return True


class _Order:
    """Whether matches come in the order asked for, and so where a search can be taken up again."""

    def __init__(self) -> None:
        self._newest: datetime | None = None
        self._steps = 0
        self._sorted = True

    def note(self, moment: datetime | None) -> None:
        """Take account of a match."""
        if moment is None or (self._newest is not None and moment < self._newest):
            self._sorted = False
        elif self._newest is None or moment > self._newest:
            self._newest = moment
            self._steps += 1

    @property
    def resume(self) -> datetime | None:
        """A time before which everything was seen; None if the order cannot be relied on."""
        if self._newest is None or not self._sorted or self._steps < _TRUSTED_STEPS:
            return None
        return self._newest - _TOLERANCE


def _last_updated(interval: Interval) -> list[tuple[str, str]]:
    bounds = [("_lastUpdated", f"ge{_instant(interval.start)}")] if interval.start else []
    return [*bounds, ("_lastUpdated", f"lt{_instant(interval.end)}")]


def _instant(moment: datetime) -> str:
    """As servers compare it: in milliseconds, so that neighbouring intervals share their bound."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _type_of(body: bytes) -> str:
    try:
        return read_header(body).resourceType
    except MalformedResource:
        return ""


def _ahead(call: Callable[[], T]) -> Future[T]:
    """Run a call in a thread that dies with the process, as nobody may come for its result."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="next page", daemon=True).start()
    return future
