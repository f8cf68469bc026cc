"""The source ``search``: the resources of a FHIR server, read by searches of ``_lastUpdated``, type by type."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.client.http import FhirClient, Params
from fhir_assets.fhir.client.response import HttpStatusError
from fhir_assets.fhir.record import Deletion, Record, RejectedInput
from fhir_assets.fhir.search.page import SearchPage, parse_search_page
from fhir_assets.fhir.search.pager import TIME_TOLERANCE, SearchPager, last_updated_params
from fhir_assets.notices import Notice
from fhir_assets.windows import LATEST, Interval, add_clamped

IDS_AT_ONCE = 50
_CAPABILITIES_VALID_FOR = timedelta(minutes=10)
_UNSUPPORTED_STATUS = frozenset({400, 422, 501})
"""The statuses with which servers refuse a search parameter that they do not support."""
_ID = re.compile(r"[A-Za-z0-9\-.]{1,64}")


class SearchSource:
    """The resources of a FHIR server, through its search.

    ``page_size`` is sent as ``_count``. ``included`` counts, by type, the entries of mode ``include``.
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

    def list_types(self) -> frozenset[str] | None:
        """Return the types that the server's CapabilityStatement names as searchable; None if it names no types.

        The statement is requested every ten minutes at most.
        """
        now = self._now()
        if self._offered_until is None or now >= self._offered_until:
            self._offered = self._client.capabilities().list_types("search-type")
            self._offered_until = now + _CAPABILITIES_VALID_FOR
        return self._offered

    def compute_state(self) -> None:
        """Return None: a server is read by interval, not as a whole."""

    def complete_until(self, intervals: Mapping[str, Interval]) -> dict[str, datetime]:
        """Return nothing: the server includes the present."""
        return {}

    def count(self, resource_type: str, interval: Interval) -> int | None:
        """Return the server's own total (``_summary=count``); None if the server does not give one."""
        try:
            return self._total(resource_type, last_updated_params(interval))
        except HttpStatusError as error:
            if error.status not in _UNSUPPORTED_STATUS:
                raise
            return None

    def find_extent(self, resource_types: Sequence[str]) -> Interval | None:
        """Return the interval from the oldest to the newest resource, found by two sorted searches for each type.

        The totals show whether the server sorts. If it does not, the interval is open below and ends now.
        """
        now = self._now()
        extents = [extent for name in resource_types if (extent := self._type_extent(name, now))]
        if not extents:
            return None
        starts = [extent.start for extent in extents if extent.start is not None]
        return Interval(min(starts) if len(starts) == len(extents) else None, max(extent.end for extent in extents))

    def fetch(self, resource_types: Sequence[str], interval: Interval) -> Iterator[Record | RejectedInput]:
        """Read every version of a resource that the server returns for the interval, without duplicates.

        Raises NotFhir if the server ignores ``_lastUpdated`` or its paging has no end, and the errors of
        ``FhirClient.get``.
        """
        for name in resource_types:
            yield from self._pager(name).read_interval(interval)

    def fetch_ids(self, resource_type: str, ids: Sequence[str]) -> Iterator[Record | RejectedInput]:
        """Read the resources with these ids, in batches. Strings that cannot be an id are skipped."""
        valid_ids = [id_ for id_ in dict.fromkeys(ids) if _ID.fullmatch(id_)]
        for start in range(0, len(valid_ids), IDS_AT_ONCE):
            yield from self._pager(resource_type).read_ids(valid_ids[start : start + IDS_AT_ONCE])

    def find_deleted(self, resource_type: str, ids: Sequence[str]) -> Iterator[Deletion]:
        """Yield a Deletion for each id whose read is answered with status 410 (gone)."""
        for id_ in filter(_ID.fullmatch, dict.fromkeys(ids)):
            try:
                self._client.get(f"{resource_type}/{id_}", lambda response: None)
            except HttpStatusError as error:
                if error.status == 410:
                    yield Deletion(resource_type, id_, self._now())
                elif error.status != 404:
                    raise

    def drain_notices(self) -> tuple[Notice, ...]:
        """Return the notices about the server's answers since the last call."""
        return self._client.notices.drain()

    def _pager(self, resource_type: str) -> SearchPager:
        return SearchPager(self._client, resource_type, self._page_size, self._now, self.included)

    def _type_extent(self, resource_type: str, now: datetime) -> Interval | None:
        unknown = Interval(None, now)
        try:
            first = self._first_match(resource_type, sort="_lastUpdated")
            last = self._first_match(resource_type, sort="-_lastUpdated")
        except HttpStatusError as error:
            if error.status not in _UNSUPPORTED_STATUS:
                raise
            return unknown
        if first is None and last is None:
            return unknown if self._total(resource_type) else None
        oldest, newest = _read_time(first), _read_time(last)
        if oldest is not None and newest is not None:
            extent = Interval(oldest, add_clamped(newest, TIME_TOLERANCE))
            if self._total(resource_type) == self.count(resource_type, extent):
                end = min(extent.end, now)
                return Interval(min(oldest, end), end)
        return unknown

    def _first_match(self, resource_type: str, *, sort: str) -> Record | RejectedInput | None:
        page = self._get_page(resource_type, [("_sort", sort), ("_count", "1")])
        pager = SearchPager(self._client, resource_type, 1, self._now, Counter())
        return next((match for entry in page.entries if (match := pager.read_entry(entry, "entry"))), None)

    def _total(self, resource_type: str, params: Params = ()) -> int | None:
        return self._get_page(resource_type, [*params, ("_summary", "count")]).total

    def _get_page(self, resource_type: str, params: Params) -> SearchPage:
        try:
            return self._client.get(resource_type, parse_search_page, params=params)
        except NotFhir as error:
            if str(error).startswith(("GET ", self._client.base_url)):
                raise
            raise NotFhir(f"{self._client.base_url}/{resource_type}: {error}") from None


def _read_time(match: Record | RejectedInput | None) -> datetime | None:
    """Return the ``lastUpdated`` of a match, LATEST if it lies in the future; None if the match has none."""
    if not isinstance(match, Record):
        return None
    return match.last_updated if match.dated else LATEST
