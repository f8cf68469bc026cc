"""The searches of one FHIR server, with the parameters that it supports.

A parameter that the server refuses (``_sort``, ``_summary=count``, ``_total``) is no longer sent, and a page size above
the server's maximum is halved. A notice is added once for each.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fhir_assets.errors import FhirAssetsError, NotFhir, ServerUnavailable
from fhir_assets.fhir.client.http import FhirClient, Params
from fhir_assets.fhir.client.response import FhirResponse, HttpStatusError, InternalServerError
from fhir_assets.fhir.search.outcomes import note_outcome
from fhir_assets.fhir.search.page import SearchEntry, SearchPage, parse_search_page
from fhir_assets.retries import RetryPolicy

SORT = "_lastUpdated"
_MIN_PAGE_SIZE = 10
_REFUSED = frozenset({400, 405, 413, 414, 422, 501})
"""The statuses with which servers refuse a search parameter or a value that they do not support."""
_PROBE = RetryPolicy(attempts=2, max_wait=2, budget=60)
_COUNT_FORMS: tuple[Params, ...] = ((("_summary", "count"),), (("_total", "accurate"), ("_count", "1")))


@dataclass(frozen=True, slots=True)
class _Accepted:
    """The result parameters that the server accepts in a search of one type. Without ``size`` no ``_count`` is sent."""

    sorts: bool
    size: int | None

    def params(self) -> Params:
        sort = [("_sort", SORT)] if self.sorts else []
        return [*sort, *([("_count", str(self.size))] if self.size else [])]

    def list_alternatives(self) -> Iterator["_Accepted"]:
        """Yield the parameters to try next if the server refuses these but accepts a search without any."""
        sizes = [self.size] if self.size else []
        while sizes and sizes[-1] // 2 >= _MIN_PAGE_SIZE:
            sizes.append(sizes[-1] // 2)
        if self.sorts:
            yield replace(self, sorts=False)
            for size in [*sizes[1:], None] if self.size else []:
                yield replace(self, size=size)
        for size in sizes[1:]:
            yield _Accepted(sorts=False, size=size)
        yield _Accepted(sorts=False, size=None)


class Searches:
    """Sends searches to one server. May be used by several threads.

    ``page_size`` is sent as ``_count`` until the server refuses it.
    """

    def __init__(self, client: FhirClient, page_size: int) -> None:
        self.client = client
        self._page_size: int | None = page_size
        self._unsorted: set[str] = set()
        self._refused_counts: defaultdict[tuple[str, frozenset[str]], set[int]] = defaultdict(set)
        """For each type and set of filter names, the forms of a count that the server refused, possibly for its
        filters.
        """
        self._noticed: set[str] = set()

    def first_page(self, resource_type: str, filters: Params) -> SearchPage:
        """Request the first page of a search, sorted by ``_lastUpdated`` if the server sorts.

        Raises the errors of ``FhirClient.get`` if the server refuses the search itself.
        """
        accepted = _Accepted(sorts=self.sorts(resource_type), size=self._page_size)
        try:
            return self._get(resource_type, [*filters, *accepted.params()])
        except (HttpStatusError, InternalServerError) as error:
            if not _is_refusal(error) or not accepted.params():
                raise
            self._get(resource_type, filters, _PROBE)  # raises if the search itself is refused
            page, found = self._find_accepted(resource_type, filters, accepted, error)
        if found.size != accepted.size:
            self._page_size = found.size
            self._notice(
                "page-size",
                f"{self.client.base_url} refuses pages of {accepted.size} resources: it is asked for "
                + (f"{found.size}" if found.size else "pages of its own size")
                + f"; set {self.client.labels.page_size} to what the server accepts",
            )
        return page

    def next_page(self, resource_type: str, url: str) -> SearchPage:
        """Request the page at a URL of the server. Raises NotFhir with advice if the URL is not below the base URL."""
        try:
            return self._get(resource_type, (), url=url)
        except (HttpStatusError, NotFhir, ServerUnavailable) as error:
            if not self.client.leads_elsewhere(url):
                raise
            answer = f"answers {error.status}" if isinstance(error, HttpStatusError) else "does not answer with FHIR"
            advice = self.client.describe_links(url)
            raise NotFhir(f"the next page of a search of {resource_type} {answer}: {advice}") from None

    def first_matches(self, resource_type: str, filters: Params = ()) -> SearchPage:
        """Request one match: the oldest if the server sorts."""
        accepted = _Accepted(sorts=self.sorts(resource_type), size=1)
        try:
            return self._get(resource_type, [*filters, *accepted.params()])
        except (HttpStatusError, InternalServerError) as error:
            if not _is_refusal(error):
                raise
            return self._find_accepted(resource_type, filters, accepted, error)[0]

    def count(self, resource_type: str, filters: Params) -> int | None:
        """Return the server's own total; None if it does not give one, which is a notice.

        Raises the errors of ``FhirClient.get`` for other reasons than a refused parameter.
        """
        refused = self._refused_counts[resource_type, frozenset(name for name, _ in filters)]
        for number, form in enumerate(_COUNT_FORMS):
            if number in refused:
                continue
            try:
                page = self._get(resource_type, [*filters, *form])
            except (HttpStatusError, InternalServerError) as error:
                if not _is_refusal(error):
                    raise
                refused.add(number)
                continue
            if page.total is not None:
                return page.total
        self._notice(
            "no-totals",
            f"{self.client.base_url} does not count the matches of a search (_summary=count, _total): whether all "
            "resources of a window have come cannot be compared with the server",
        )
        return None

    def sorts(self, resource_type: str) -> bool:
        """Return whether searches of the type are sorted, as far as is known."""
        return resource_type not in self._unsorted

    def note_unsorted(self, resource_type: str, verb: str) -> None:
        """Note that the server ``refuses`` or ``ignores`` ``_sort`` for a type; searches are no longer sorted."""
        if resource_type in self._unsorted:
            return
        self._unsorted.add(resource_type)
        self._notice(
            f"sort-{verb}",
            f"{self.client.base_url} {verb} _sort=_lastUpdated: resources are read in the order of the server, and a "
            "search that breaks off is restarted",
        )

    def note_outcomes(self, resource_type: str, page: SearchPage) -> None:
        """Add notices for the OperationOutcomes among the entries of a page."""
        for entry in page.entries:
            if isinstance(entry, SearchEntry) and entry.mode == "outcome":
                note_outcome(self.client.notices, resource_type, bytes(entry.resource))

    def _find_accepted(
        self, resource_type: str, filters: Params, accepted: _Accepted, refusal: FhirAssetsError
    ) -> tuple[SearchPage, _Accepted]:
        """Return the page for the most complete set of parameters that the server accepts, and these parameters.

        Raises ``refusal`` if it accepts none.
        """
        for attempt in accepted.list_alternatives():
            try:
                page = self._get(resource_type, [*filters, *attempt.params()], _PROBE)
            except (HttpStatusError, InternalServerError) as error:
                if not _is_refusal(error):
                    raise
                continue
            if accepted.sorts and not attempt.sorts:
                self.note_unsorted(resource_type, "refuses")
            return page, attempt
        raise refusal

    def _get(
        self, resource_type: str, params: Params, policy: RetryPolicy | None = None, *, url: str | None = None
    ) -> SearchPage:
        def read(response: FhirResponse) -> SearchPage:
            try:
                page = parse_search_page(response)
            except NotFhir as error:
                raise NotFhir(f"{self.client.base_url}/{resource_type}: {error}") from None
            if response.age:
                self._notice_cache(response.age)
            return page

        page = self.client.get(url or resource_type, read, params=params, policy=policy)
        self.note_outcomes(resource_type, page)
        return page

    def _notice_cache(self, age: int) -> None:
        self._notice(
            "stale-answer",
            f"a cache in front of {self.client.base_url} answers searches, at first with an answer that was {age} s "
            "old (its Age header): exclude the FHIR server from the cache",
        )

    def _notice(self, code: str, message: str) -> None:
        """Add a warning unless this process has added one with the same code before."""
        if code not in self._noticed:
            self._noticed.add(code)
            self.client.notices.add("warning", code, message)


def _is_refusal(error: FhirAssetsError) -> bool:
    return isinstance(error, InternalServerError) or (isinstance(error, HttpStatusError) and error.status in _REFUSED)
