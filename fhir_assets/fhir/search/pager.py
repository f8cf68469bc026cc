"""One search over all of its pages: duplicates removed, expired pages handled, entries turned into records."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import msgspec

from fhir_assets.errors import NotFhir, ServerUnavailable
from fhir_assets.fhir.client.http import FhirClient, Params
from fhir_assets.fhir.client.response import FhirResponse, HttpStatusError
from fhir_assets.fhir.record import (
    CLOCK_SKEW,
    MalformedResource,
    Record,
    RejectedInput,
    build_record,
    read_header,
    to_single_line,
)
from fhir_assets.fhir.search.page import SearchEntry, SearchPage, parse_search_page
from fhir_assets.fhir.seen_versions import SeenVersions
from fhir_assets.windows import Interval

T = TypeVar("T")

TIME_TOLERANCE = timedelta(seconds=1)
"""Some servers show ``lastUpdated`` less precisely than they compare it."""

_MAX_RESTARTS_WITHOUT_PROGRESS = 3
_MAX_PAGES_WITHOUT_PROGRESS = 1000
_STEPS_THAT_PROVE_SORTING = 10
"""After this many distinct ascending times, the matches count as sorted by the server."""


class PageExpired(Exception):
    """The next page is no longer available, because the server has discarded the search."""


class SearchPager:
    """Reads one search of a resource type over all of its pages and restarts.

    A version of a resource is returned once, even if several pages contain it. ``included`` counts, by type, the
    entries of mode ``include``.
    """

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
        self._order = _MatchOrder()
        self._began: datetime | None = None

    def read_interval(self, interval: Interval) -> Iterator[Record | RejectedInput]:
        """Read the resources of an interval. A page that expires restarts the search from the last time seen."""

        def accept(record: Record) -> bool:
            return self._belongs(record, interval)

        start = interval.start
        restarts = 0
        while True:
            before = len(self._seen)
            bounds = last_updated_params(Interval(start, interval.end))
            try:
                yield from self._read([*bounds, ("_sort", "_lastUpdated"), self._count], accept)
                return
            except PageExpired:
                restarts = 0 if len(self._seen) > before else restarts + 1
                self._raise_if_no_progress(restarts)
                start = max(filter(None, (self._order.resume_from, interval.start)), default=None)

    def read_ids(self, ids: Sequence[str]) -> Iterator[Record | RejectedInput]:
        """Read the resources with these ids, which must fit into one URL."""
        wanted = frozenset(ids)

        def accept(record: Record) -> bool:
            if record.id not in wanted:
                raise NotFhir(f"a search of {self._type} by _id returned other ids too: the server ignores _id")
            return True

        for restarts in range(1, _MAX_RESTARTS_WITHOUT_PROGRESS + 1):
            try:
                yield from self._read([("_id", ",".join(ids)), self._count], accept)
                return
            except PageExpired:
                self._raise_if_no_progress(restarts)

    def _raise_if_no_progress(self, restarts: int) -> None:
        if restarts >= _MAX_RESTARTS_WITHOUT_PROGRESS:
            raise ServerUnavailable(
                f"the pages of a search of {self._type} expire before they can be read, even after {restarts} new "
                f"searches: lower {self._client.labels.page_size}, or let the server keep its searches longer"
            )

    def _read(self, params: Params, accept: Callable[[Record], bool]) -> Iterator[Record | RejectedInput]:
        pages_without_progress = 0
        for page_number, page in enumerate(self._pages(params), 1):
            before = len(self._seen)
            self._began = self._began or page.date or self._now()
            for entry_number, entry in enumerate(page.entries, 1):
                item = self.read_entry(entry, f"page {page_number}, entry {entry_number}")
                if item is None:
                    continue
                if isinstance(item, RejectedInput):
                    if self._seen.add((item.resource_id, item.body)):
                        yield item
                elif accept(item) and self._seen.add(item.version_key):
                    self._order.note(item.last_updated)
                    yield item
            pages_without_progress = 0 if len(self._seen) > before else pages_without_progress + 1
            if pages_without_progress > _MAX_PAGES_WITHOUT_PROGRESS:
                raise NotFhir(
                    f"a search of {self._type} returned {pages_without_progress} pages in a row without a new "
                    "resource: the server's paging has no end"
                )

    def _pages(self, params: Params) -> Iterator[SearchPage]:
        """Read the pages in order; the next page is requested while the current one is used. Raises PageExpired."""
        page = self._client.get(self._type, self._parse_page, params=params)
        links = set()
        while page.next_link is not None:
            url = self._client.resolve(page.next_link, page.url)
            if hash(url) in links:
                raise NotFhir(f"the next links of a search of {self._type} form a loop: the server's paging is broken")
            links.add(hash(url))
            next_page = _start(lambda url=url: self._client.get(url, self._parse_page))  # type: ignore[misc]
            yield page
            try:
                page = next_page.result()
            except HttpStatusError as error:
                if error.status in (404, 410):
                    raise PageExpired from None
                raise
        yield page

    def _parse_page(self, response: FhirResponse) -> SearchPage:
        try:
            return parse_search_page(response)
        except NotFhir as error:
            raise NotFhir(f"{self._client.base_url}/{self._type}: {error}") from None

    def read_entry(self, entry: SearchEntry | msgspec.Raw, path: str) -> Record | RejectedInput | None:
        """Return the record of a match, or a RejectedInput if the match is malformed; None if the entry is not a match.

        ``path`` is the location of the entry, for the rejected input.
        """
        if isinstance(entry, msgspec.Raw):
            return self._reject("structure", path, "an entry that is not a valid Bundle entry", bytes(entry))
        if entry.mode == "outcome":
            return None
        body = to_single_line(bytes(entry.resource))
        if entry.mode == "include":
            self._included[_resource_type(body)] += 1
            return None
        if not body:
            return self._reject("structure", path, "an entry without a resource", body)
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
            return self._reject(error.rule, path, str(error), body, resource_id)

    def _reject(self, rule: str, path: str, message: str, body: bytes, resource_id: str | None = None) -> RejectedInput:
        return RejectedInput(self._type, resource_id, rule, f"{self._type} search, {path}", message, self._now(), body)

    def _belongs(self, record: Record, interval: Interval) -> bool:
        """Return whether a match lies in the interval.

        A resource that is updated while the search runs has moved to a later interval. Raises NotFhir for any other
        match outside of the interval.
        """
        moment = record.last_updated
        if moment is None:
            return True
        began = self._began or self._now()
        if moment >= interval.end + TIME_TOLERANCE and moment >= began - CLOCK_SKEW:
            return False
        early = interval.start is not None and moment < interval.start - TIME_TOLERANCE
        if early or moment >= interval.end + TIME_TOLERANCE:
            raise NotFhir(
                f"{self._client.base_url}/{self._type}: the server returns resources outside of the requested "
                "_lastUpdated interval, so windows cannot be separated: make _lastUpdated searchable there, or load "
                f"an export with {self._client.labels.file_source}"
            )
        return True


class _MatchOrder:
    """Tracks whether the matches arrive in the requested order, and from which time a search can resume."""

    def __init__(self) -> None:
        self._newest: datetime | None = None
        self._steps = 0
        self._sorted = True

    def note(self, moment: datetime | None) -> None:
        """Record the ``lastUpdated`` of the next match."""
        if moment is None or (self._newest is not None and moment < self._newest):
            self._sorted = False
        elif self._newest is None or moment > self._newest:
            self._newest = moment
            self._steps += 1

    @property
    def resume_from(self) -> datetime | None:
        """The time before which every match has been read; None if the matches are not reliably sorted."""
        if self._newest is None or not self._sorted or self._steps < _STEPS_THAT_PROVE_SORTING:
            return None
        return self._newest - TIME_TOLERANCE


def last_updated_params(interval: Interval) -> list[tuple[str, str]]:
    """Return the search parameters for an interval. Bounds have milliseconds, so that adjacent intervals meet."""
    bounds = [("_lastUpdated", f"ge{_format_instant(interval.start)}")] if interval.start else []
    return [*bounds, ("_lastUpdated", f"lt{_format_instant(interval.end)}")]


def _format_instant(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _resource_type(body: bytes) -> str:
    try:
        return read_header(body).resourceType
    except MalformedResource:
        return ""


def _start(call: Callable[[], T]) -> Future[T]:
    """Run a call in a daemon thread, which does not keep the process alive if the result is never read."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="next page", daemon=True).start()
    return future
