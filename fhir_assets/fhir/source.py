"""The interface of a source of resources: a FHIR server, its bulk exports, or files."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Protocol

from fhir_assets.errors import ServerRefused
from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.notices import Notice
from fhir_assets.windows import Interval


class Source(Protocol):
    """A source of resources. The pipeline reads it by resource type and by interval of ``meta.lastUpdated``."""

    name: str
    refused: Mapping[str, ServerRefused]
    """The types that the last call of ``find_extent`` or ``complete_until`` left out because the server refuses them.

    A source that is read type by type raises the error instead.
    """
    one_pass: bool
    """True if all types are read together (files, a bulk export), False if the types are read separately."""

    def list_types(self) -> frozenset[str] | None:
        """Return the resource types that the source offers; None if they are unknown."""
        ...

    def compute_state(self) -> str | None:
        """Return a digest that changes when the source changes, for sources that are read as a whole (files).

        Sources that are read by interval return None.
        """
        ...

    def find_extent(self, resource_types: Sequence[str]) -> Interval | None:
        """Return the interval from the oldest ``as_of`` to just after the newest; None if the source is empty."""
        ...

    def read_clock(self) -> datetime | None:
        """Return the time of the source's clock, which dates its resources; None if it is unknown."""
        ...

    def complete_until(self, intervals: Mapping[str, Interval]) -> Mapping[str, datetime]:
        """Return by type the time up to which the source is complete, for snapshots of the past (bulk exports).

        ``intervals`` has the interval to read by type. Sources that include the present return an empty mapping.
        """
        ...

    def count(self, resource_type: str, interval: Interval) -> int | None:
        """Return the number of resources in ``interval`` as declared by the source; None if it declares none."""
        ...

    def fetch(self, resource_types: Sequence[str], interval: Interval) -> Iterator[Record | RejectedInput]:
        """Stream the resources of the types whose ``lastUpdated`` lies in ``interval``, and those without one.

        Raises ServerUnavailable, ServerRefused or NotFhir. The records before the error are valid but incomplete.
        """
        ...

    def drain_notices(self) -> tuple[Notice, ...]:
        """Return the notices since the last call. They concern the windows that were counted and fetched since then."""
        ...
