"""The source ``search``: the resources of a FHIR server, read by searches of ``_lastUpdated``, type by type."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from fhir_assets.errors import ServerRefused
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.client.response import HttpStatusError
from fhir_assets.fhir.record import CLOCK_SKEW, Deletion, Record, RejectedInput
from fhir_assets.fhir.search.extent import ExtentFinder
from fhir_assets.fhir.search.pager import SearchPager, last_updated_params
from fhir_assets.fhir.search.searches import Searches
from fhir_assets.notices import Notice
from fhir_assets.windows import Interval

IDS_PER_REQUEST = 50
_CAPABILITIES_VALID_FOR = timedelta(minutes=10)
_FIRST_DATE = datetime(1900, 1, 1, tzinfo=UTC)
_ID = re.compile(r"[A-Za-z0-9\-.]{1,64}")


class SearchSource:
    """The resources of a FHIR server, through its search.

    ``page_size`` is sent as ``_count``. ``included`` counts, by type, the entries of mode ``include``.
    """

    name = "search"
    one_pass = False
    refused: Mapping[str, ServerRefused] = MappingProxyType({})

    def __init__(
        self,
        client: FhirClient,
        *,
        page_size: int = 500,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client = client
        self._searches = Searches(client, page_size)
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

    def read_clock(self) -> datetime | None:
        """Return the time of the server's clock, from the Date headers of its answers; None if it sends none."""
        if self._client.clock.read() is None:
            self.list_types()
        return self._client.clock.read()

    def complete_until(self, intervals: Mapping[str, Interval]) -> dict[str, datetime]:
        """Return the time of the server's clock by type, because no search finds resources that are written later."""
        clock = self.read_clock()
        return dict.fromkeys(intervals, clock) if clock else {}

    def count(self, resource_type: str, interval: Interval) -> int | None:
        """Return the server's own total; None if the server does not give one."""
        return self._searches.count(resource_type, last_updated_params(interval))

    def find_extent(self, resource_types: Sequence[str]) -> Interval | None:
        """Return the interval from the oldest resource to now, without a start if the oldest of a type is unknown."""
        now = self._now()
        extents = [extent for name in resource_types if (extent := ExtentFinder(self._searches, name, now).find())]
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
        for start in range(0, len(valid_ids), IDS_PER_REQUEST):
            yield from self._pager(resource_type).read_ids(valid_ids[start : start + IDS_PER_REQUEST])

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

    def count_all(self, resource_type: str) -> int | None:
        """Return the server's own total of a type, regardless of dates; None if the server does not give one."""
        return self._searches.count(resource_type, [])

    def fetch_all(self, resource_type: str) -> Iterator[Record | RejectedInput]:
        """Read all resources of a type by one search without a filter. Raises as ``fetch``."""
        yield from self._pager(resource_type).read_all([])

    def count_undated(self, resource_type: str) -> int | None:
        """Return the number of resources that the server counts, but that no ``_lastUpdated`` filter matches.

        These resources have no date, or a date in the future. Return None if the server does not count, or refuses a
        search without a filter.
        """
        try:
            total = self._searches.count(resource_type, [])
        except ServerRefused:
            return None
        if not total:
            return total
        dated = self.count(resource_type, Interval(_FIRST_DATE, self._now() + CLOCK_SKEW))
        return None if dated is None else max(0, total - dated)

    def fetch_undated(self, resource_type: str, *, filtered: bool) -> Iterator[Record | RejectedInput]:
        """Read the resources without a valid ``lastUpdated``, with the modifier ``:missing`` or among all resources.

        A malformed entry is yielded if it has no date: the searches by date yield the others. Raises as ``fetch``.
        """
        params = [("_lastUpdated:missing", "true")] if filtered else []
        for item in self._pager(resource_type).read_all(params):
            if isinstance(item, Record):
                if item.last_updated is None:
                    yield item
            elif b'"lastUpdated"' not in item.body:
                yield item

    def drain_notices(self) -> tuple[Notice, ...]:
        """Return the notices about the server's answers since the last call."""
        return self._client.notices.drain()

    def _pager(self, resource_type: str) -> SearchPager:
        return SearchPager(self._searches, resource_type, self._now, self.included)
