"""The time of the oldest resource of a type on a FHIR server."""

from collections import Counter
from datetime import UTC, datetime, timedelta

from fhir_assets.fhir.client.response import HttpStatusError
from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.fhir.search.outcomes import is_error
from fhir_assets.fhir.search.page import SearchEntry, SearchPage
from fhir_assets.fhir.search.pager import TIME_TOLERANCE, SearchPager, before_param
from fhir_assets.fhir.search.searches import Searches
from fhir_assets.windows import Interval, add_clamped

_OLDEST = datetime(2000, 1, 1, tzinfo=UTC)
"""A server with resources older than this is read from the first window on."""
_PRECISION = timedelta(hours=1)
_UNSUPPORTED = frozenset({400, 422, 501})


class ExtentFinder:
    """Finds the interval in which a server has resources of a type.

    The oldest match of a sorted search is used if nothing older is found. Otherwise the server does not sort, and the
    time before which nothing is found is determined by bisection.
    """

    def __init__(self, searches: Searches, resource_type: str, now: datetime) -> None:
        self._searches = searches
        self._type = resource_type
        self._now = now

    def find(self) -> Interval | None:
        """Return the interval from the oldest resource to now; None if the server has no resource of the type.

        The interval has no start if the oldest resource is unknown. Raises the errors of ``FhirClient.get``.
        """
        page = self._searches.first_matches(self._type)
        first = self._read_match(page)
        if first is None and _is_empty(page):
            return None
        try:
            oldest = self._verify(first) or self._bisect()
        except HttpStatusError as error:
            if error.status not in _UNSUPPORTED:
                raise
            oldest = None
        return Interval(oldest and min(oldest, self._now), self._now)

    def _verify(self, first: Record | RejectedInput | None) -> datetime | None:
        """Return the time of the first match of a sorted search if no match is older; None if that is unknown."""
        if not isinstance(first, Record):
            return None
        moment = first.last_updated if first.dated else self._now  # a time in the future does not count
        if moment is None:
            return None
        if not self._has_older(moment, than=first):
            return moment
        self._searches.note_unsorted(self._type, "ignores")
        return None

    def _bisect(self) -> datetime | None:
        """Return a time before which the server has nothing, at most an hour before its oldest resource."""
        low, high = _OLDEST, self._now
        if self._has_older(low) or not self._has_older(high):
            return None
        while high - low > _PRECISION:
            middle = low + (high - low) / 2
            if self._has_older(middle):
                high = middle
            else:
                low = middle
        return low

    def _has_older(self, moment: datetime, *, than: Record | None = None) -> bool:
        """Return whether the server may have a resource older than ``moment``, other than ``than``."""
        page = self._searches.first_matches(self._type, before_param(moment))
        match = self._read_match(page)
        if than is not None and isinstance(match, Record) and match.id == than.id:
            # The server shows times less precisely than it compares them, or it ignores the bound.
            return self._has_older(add_clamped(moment, -TIME_TOLERANCE))
        return match is not None or not _is_empty(page)

    def _read_match(self, page: SearchPage) -> Record | RejectedInput | None:
        pager = SearchPager(self._searches, self._type, lambda: self._now, Counter())
        return next((match for entry in page.entries if (match := pager.read_entry(entry, "entry"))), None)


def _is_empty(page: SearchPage) -> bool:
    """Return whether a page proves that there are no matches: it has none and no next page, and reports no error."""
    errors = (isinstance(entry, SearchEntry) and is_error(bytes(entry.resource)) for entry in page.entries)
    return page.next_link is None and not page.total and not any(errors)
