"""Counts and reads undated resources: those without ``meta.lastUpdated``.

A search by ``_lastUpdated`` does not find them on some servers, so that no window would contain them.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Protocol, runtime_checkable

from fhir_assets.errors import NotFhir, ServerRefused
from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.storage.manifest import Manifest, Undated

INTERVAL = timedelta(days=1)
"""The time after which the undated resources are read again. They belong to the current window."""


@runtime_checkable
class UndatedSource(Protocol):
    """A source that can count and read undated resources."""

    def count_undated(self, resource_type: str) -> int | None:
        """Return the number of undated resources; None if the source does not report it."""
        ...

    def fetch_undated(self, resource_type: str, *, filtered: bool) -> Iterator[Record | RejectedInput]:
        """Yield the undated resources: with a filter of the server, or by reading all resources of the type."""
        ...


def is_due(base: Manifest | None, now: datetime) -> bool:
    """Return whether no fetch of a window has read the undated resources within INTERVAL.

    ``base`` is the manifest of the window's raw partition, if it has one.
    """
    fetches = base.fetched.fetches if base and base.fetched else ()
    return all(fetch.undated is None or now - fetch.undated.at >= INTERVAL for fetch in fetches)


class UndatedReader:
    """Reads the undated resources of one type, and counts those that the server reports but does not return."""

    def __init__(self, source: UndatedSource, resource_type: str) -> None:
        self._source = source
        self._type = resource_type
        self._seen: set[int] = set()
        self._expected: int | None = None
        self._missing: int | None = None

    def read(self) -> Iterator[Record | RejectedInput]:
        """Yield each undated resource once. Nothing is read if the server has none.

        A refusal of the server is not raised: ``build_result`` reports what is missing. Raises ServerUnavailable.
        """
        self._expected = self._source.count_undated(self._type)
        if self._expected == 0:
            self._missing = 0
            return
        for filtered in (True, False):
            try:
                yield from self._read_new(filtered=filtered)
            except (ServerRefused, NotFhir):
                continue
            if self._expected is None or len(self._seen) >= self._expected:
                self._missing = 0
                return
        if self._expected is not None:
            # Resources may have been deleted since the first count.
            recounted = self._source.count_undated(self._type)
            expected = self._expected if recounted is None else min(self._expected, recounted)
            self._missing = max(0, expected - len(self._seen))

    def _read_new(self, *, filtered: bool) -> Iterator[Record | RejectedInput]:
        for item in self._source.fetch_undated(self._type, filtered=filtered):
            key = hash(item.body)
            if key not in self._seen:
                self._seen.add(key)
                yield item

    def build_result(self, at: datetime, *, repeated: int, rejected: int) -> Undated:
        """Return the counts for the manifest of the current window."""
        return Undated(at, self._expected, len(self._seen), repeated, rejected, self._missing)
