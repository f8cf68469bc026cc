"""One search over all of its pages: removes duplicates, handles expired pages, and turns entries into records."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TypeVar

import msgspec

from fhir_assets.errors import FhirAssetsError, NotFhir, ServerUnavailable
from fhir_assets.fhir.client.clock import MAX_SKEW, format_duration
from fhir_assets.fhir.client.http import Params
from fhir_assets.fhir.client.response import HttpStatusError
from fhir_assets.fhir.record import (
    CLOCK_SKEW,
    MalformedResource,
    Record,
    RejectedInput,
    build_record,
    read_header,
    to_single_line,
)
from fhir_assets.fhir.search.outcomes import note_outcome
from fhir_assets.fhir.search.page import SearchEntry, SearchPage
from fhir_assets.fhir.search.searches import Searches
from fhir_assets.fhir.seen_versions import SeenVersions
from fhir_assets.windows import Interval

T = TypeVar("T")

TIME_TOLERANCE = timedelta(seconds=1)
"""Some servers return ``lastUpdated`` less precisely than they compare it."""

_MAX_RESTARTS_WITHOUT_PROGRESS = 3
_MAX_PAGES_WITHOUT_PROGRESS = 1000
_STEPS_THAT_PROVE_SORTING = 10
"""After this many distinct ascending times, the server is assumed to sort the matches."""


class PageExpired(Exception):
    """The next page is no longer available, because the server has discarded the search."""


class _PagesEnded(Exception):
    """The pages of a search cannot be followed to a page that the server marks as the last.

    ``pages`` have been read. ``error`` is to be raised if resources are missing. ``is_expired`` means that a new search
    may get further.
    """

    def __init__(self, pages: int, error: FhirAssetsError | None, *, is_expired: bool = False) -> None:
        super().__init__()
        self.pages = pages
        self.error = error
        self.is_expired = is_expired


class SearchPager:
    """Reads one search of a resource type over all of its pages and restarts.

    A version of a resource is returned once, even if several pages contain it. ``included`` counts, by type, the
    entries of mode ``include``.
    """

    def __init__(
        self, searches: Searches, resource_type: str, now: Callable[[], datetime], included: Counter[str]
    ) -> None:
        self._searches = searches
        self._client = searches.client
        self._type = resource_type
        self._now = now
        self._arrived = now()
        self._included = included
        self._seen = SeenVersions()
        self._rejected = 0
        self._order = _MatchOrder()
        self._started_at: datetime | None = None
        self._pages_read = 0

    def read_interval(self, interval: Interval) -> Iterator[Record | RejectedInput]:
        """Read the resources of an interval.

        If a page expires, the search is restarted from the last time that was read.
        """

        def accept(record: Record) -> bool:
            return self._belongs(record, interval)

        start = interval.start
        restarts = 0
        while True:
            before = len(self._seen)
            self._order = _MatchOrder()
            try:
                yield from self._read(last_updated_params(Interval(start, interval.end)), accept, interval.end)
                return
            except _PagesEnded as ended:
                if self._is_complete(last_updated_params(interval), ended):
                    return
                restarts = 0 if len(self._seen) > before else restarts + 1
                self._raise_if_no_progress(restarts, ended)
                if (resume := self._order.resume_from) is not None:
                    start = resume if start is None else max(start, resume)

    def read_ids(self, ids: Sequence[str]) -> Iterator[Record | RejectedInput]:
        """Read the resources with these ids, which must fit into one URL."""
        wanted = frozenset(ids)

        def accept(record: Record) -> bool:
            if record.id not in wanted:
                raise NotFhir(f"a search of {self._type} by _id returned other ids too: the server ignores _id")
            return True

        yield from self._read_again([("_id", ",".join(ids))], accept)

    def read_all(self, params: Params) -> Iterator[Record | RejectedInput]:
        """Read all matches of a search with other parameters than the date, or without parameters."""
        yield from self._read_again(params, lambda record: True)

    def _read_again(self, params: Params, accept: Callable[[Record], bool]) -> Iterator[Record | RejectedInput]:
        """Read a search. Restart it if its pages end too early."""
        for restarts in range(1, _MAX_RESTARTS_WITHOUT_PROGRESS + 1):
            try:
                yield from self._read(params, accept)
                return
            except _PagesEnded as ended:
                if self._is_complete(params, ended):
                    return
                self._raise_if_no_progress(restarts, ended)

    def _is_complete(self, params: Params, ended: _PagesEnded) -> bool:
        """Return whether all matches that the server counts have been read, so that the search need not be restarted.

        Rejected entries are not counted, because the server may not count them. If there is no error to raise, the
        search counts as complete in any case, and missing resources are a notice.
        """
        total = None
        with suppress(FhirAssetsError):
            total = self._searches.count(self._type, params)
        if total is not None and total == len(self._seen) - self._rejected:
            self._client.notices.add(
                "warning",
                "next-link",
                f"the last page of a search of {self._type} has a next link that leads nowhere; all {total} resources "
                "that the server counts have come",
                self._type,
            )
            return True
        if ended.error is None:
            self._client.notices.add(
                "error",
                "next-link",
                f"a page of a search of {self._type} names a next page without its address, so that resources may be "
                "missing: ask the server's administrator, then materialize raw, validated and normalized of the window "
                "again",
                self._type,
            )
        return ended.error is None

    def _raise_if_no_progress(self, restarts: int, ended: _PagesEnded) -> None:
        if ended.error is not None and not ended.is_expired:
            raise ended.error
        if restarts < _MAX_RESTARTS_WITHOUT_PROGRESS:
            return
        if ended.pages <= 1:
            raise ServerUnavailable(
                f"the first next link of a search of {self._type} leads to nothing (404 or 410), even after {restarts} "
                "new searches: the server's paging is broken, or a proxy in front of it changes the links"
            )
        raise ServerUnavailable(
            f"the pages of a search of {self._type} expire before they can be read, even after {restarts} new "
            f"searches: lower {self._client.labels.page_size}, or let the server keep its searches longer"
        )

    def _read(
        self, params: Params, accept: Callable[[Record], bool], until: datetime | None = None
    ) -> Iterator[Record | RejectedInput]:
        """Read a search over all pages. ``until`` is the end of the interval that the first page must cover."""
        pages_without_progress = 0
        for page_number, page in enumerate(self._pages(params), 1):
            before = len(self._seen)
            if page_number == 1 and until is not None:
                self._check_date(page, until)
            self._started_at = self._started_at or page.date or self._now()
            for entry_number, entry in enumerate(page.entries, 1):
                item = self.read_entry(entry, f"page {page_number}, entry {entry_number}")
                if item is None:
                    continue
                if isinstance(item, RejectedInput):
                    if self._seen.add((item.resource_id, item.body)):
                        self._rejected += 1
                        yield item
                elif accept(item):
                    self._order.note(item.last_updated)
                    if self._seen.add(item.version_key):
                        yield item
            if self._order.is_descending:
                self._searches.note_unsorted(self._type, "ignores")
            pages_without_progress = 0 if len(self._seen) > before else pages_without_progress + 1
            if pages_without_progress > _MAX_PAGES_WITHOUT_PROGRESS:
                raise _PagesEnded(
                    page_number,
                    NotFhir(
                        f"a search of {self._type} returned {pages_without_progress} pages in a row without a new "
                        "resource: the server's paging has no end"
                    ),
                )

    def _check_date(self, page: SearchPage, until: datetime) -> None:
        """Add a notice if the answer is older than the end of its interval, so that it cannot be complete."""
        if page.date is not None and page.date < until - MAX_SKEW:
            self._client.notices.add(
                "error",
                "outdated-answer",
                f"the answer to a search of {self._type} was made {format_duration(until - page.date)} before the end "
                "of the requested interval (its Date header): a cache answers in place of the server, or the "
                "clocks differ; correct that, then materialize raw, validated and normalized of the window again",
                self._type,
            )

    def _pages(self, params: Params) -> Iterator[SearchPage]:
        """Read the pages in order; the next page is requested while the current one is used.

        Raises _PagesEnded.
        """
        page = self._searches.first_page(self._type, params)
        links = set()
        number = 1
        while page.next_link is not None:
            self._pages_read += 1
            self._client.limits.check_pages(self._pages_read + 1, f"a search of {self._type}")
            if not page.next_link:
                yield page
                raise _PagesEnded(number, None)
            url = self._client.resolve(page.next_link, page.url)
            if hash(url) in links:
                yield page
                raise _PagesEnded(
                    number,
                    NotFhir(f"the next links of a search of {self._type} form a loop: the server's paging is broken"),
                )
            links.add(hash(url))
            next_page = _start(partial(self._searches.next_page, self._type, url))
            yield page
            try:
                page = next_page.result()
            except HttpStatusError as error:
                raise _PagesEnded(number, error, is_expired=error.status in (404, 410)) from None
            number += 1
        yield page

    def read_entry(self, entry: SearchEntry | msgspec.Raw, path: str) -> Record | RejectedInput | None:
        """Return the record of a match, or a RejectedInput if the match is malformed; None if the entry is not a match.

        ``path`` is the location of the entry, for the rejected input.
        """
        if isinstance(entry, msgspec.Raw):
            return self._reject("structure", path, "an entry that is not a valid Bundle entry", bytes(entry))
        if entry.mode == "outcome":
            return None  # Its notices were added when the page arrived
        body = to_single_line(bytes(entry.resource))
        if entry.mode == "include" and not self._is_match(body):
            return None
        if not body:
            return self._reject("structure", path, "an entry without a resource", body)
        resource_id = None
        try:
            header = read_header(body)
            resource_id = header.id
            if header.resource_type != self._type:
                if header.resource_type == "OperationOutcome" and entry.mode is None:
                    note_outcome(self._client.notices, self._type, body)
                    return None
                raise MalformedResource(f"a resource of another type than {self._type} among the matches", "structure")
            if not header.id:
                raise MalformedResource("a resource without an id: no server can have stored it", "structure")
            return build_record(body, header, self._arrived, received=self._now())
        except MalformedResource as error:
            return self._reject(error.rule, path, str(error), body, resource_id)

    def _is_match(self, body: bytes) -> bool:
        """Return whether an included resource is of the type that is searched. No other type was requested."""
        resource_type = _resource_type(body)
        if resource_type == self._type:
            return True
        if resource_type == "OperationOutcome":
            note_outcome(self._client.notices, self._type, body)
        else:
            self._included[resource_type] += 1
        return False

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
        started = self._started_at or self._now()
        if moment >= interval.end + TIME_TOLERANCE and moment >= started - CLOCK_SKEW:
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
    """Tracks whether the matches arrive in the requested order, and the time from which a search can resume."""

    def __init__(self) -> None:
        self._newest: datetime | None = None
        self._steps = 0
        self._sorted = True
        self.is_descending = False
        """Whether a match is older than the match before it, which means that the server does not sort."""

    def note(self, moment: datetime | None) -> None:
        """Record the ``lastUpdated`` of the next match."""
        if moment is None:
            self._sorted = False
        elif self._newest is not None and moment < self._newest:
            self._sorted = False
            self.is_descending = self.is_descending or moment < self._newest - TIME_TOLERANCE
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
    return [*bounds, *before_param(interval.end)]


def before_param(moment: datetime) -> list[tuple[str, str]]:
    """Return the search parameter for resources that were updated before ``moment``."""
    return [("_lastUpdated", f"lt{_format_instant(moment)}")]


def _format_instant(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _resource_type(body: bytes) -> str:
    try:
        return read_header(body).resource_type
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
