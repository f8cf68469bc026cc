"""The interface of everything that resources come from: a FHIR server, an export or files."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Protocol

from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.windows import Interval


class Source(Protocol):
    """Where resources come from."""

    name: str
    one_pass: bool
    """True if all types are read together (files, a bulk export), False if each type is asked for by itself."""

    def offered(self) -> frozenset[str] | None:
        """The types the source can give; None if it cannot say."""
        ...

    def state(self) -> str | None:
        """For sources that are read whole (files): changes when they change. None for those asked by interval."""
        ...

    def extent(self, resource_types: Sequence[str]) -> Interval | None:
        """From the oldest ``as_of`` that the source holds to just after the newest; None if it holds nothing."""
        ...

    def until(self, resource_types: Sequence[str], interval: Interval) -> datetime | None:
        """For sources that give the past only (a bulk export): up to when. None for those that give all until now."""
        ...

    def count(self, resource_type: str, interval: Interval) -> int | None:
        """How many resources the source says it has in ``interval``; None if it cannot say."""
        ...

    def fetch(self, resource_types: Sequence[str], interval: Interval) -> Iterator[Record | RejectedInput]:
        """Every resource of the types whose ``lastUpdated`` lies in ``interval`` (or that has none), streamed.

        Raises ServerUnavailable, ServerRefused or NotFhir; what was yielded before then is true but incomplete.
        """
        ...
