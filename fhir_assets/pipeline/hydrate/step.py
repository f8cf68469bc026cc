"""References that lead nowhere: their targets are asked for by id, and received as all that does not come by window."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fhir_assets.catalog import LOAD_ORDER
from fhir_assets.fhir.record import Deletion, Record, RejectedInput
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.receive.receiver import Received, Receiver
from fhir_assets.warehouse.postgres.db.connections import OpenSession
from fhir_assets.warehouse.postgres.queries import quality
from fhir_assets.warehouse.postgres.tables import view_tables

IDS_AT_ONCE = 5000
"""How many ids are looked up in the tables at once."""

READS_AT_ONCE = 500
"""Of how many ids that a search did not give the server is asked whether it deleted them: each is a request."""

FIRST = "Patient"


@runtime_checkable
class ReadsById(Protocol):
    """A source that gives resources by their ids."""

    def fetch_ids(self, resource_type: str, ids: Sequence[str]) -> Iterator[Record | RejectedInput]:
        """The resources of those ids that the source has."""
        ...

    def find_deleted(self, resource_type: str, ids: Sequence[str]) -> Iterator[Deletion]:
        """Those of the ids that the source says it deleted."""
        ...


@dataclass(frozen=True, slots=True)
class HydratedBatch:
    """What came of the asking for one type: ids asked for, ids that the source had, and what was received of them;
    ``deleted`` are those that it once had: they are tombstones now, and are not asked for again.
    """

    resource_type: str
    requested: int
    found: int
    received: Received
    deleted: int = 0


class HydrateStep:
    """Asks a source for what the tables of some views refer to and lack."""

    def __init__(
        self,
        connect: OpenSession,
        views: Sequence[View],
        resource_types: Sequence[str],
        source: ReadsById,
        receiver: Receiver,
        *,
        run_id: str,
    ) -> None:
        self._connect = connect
        self._views = views
        self._types = sorted(resource_types, key=lambda name: (name != FIRST, LOAD_ORDER[name]))
        self._source = source
        self._receiver = receiver
        self._run_id = run_id

    def run(self) -> Iterator[HydratedBatch]:
        """Ask for all of it, Patients first; yields what came of each batch, which is in raw then.

        Nothing is asked for twice in a day. Raises what the source and the receiver raise.
        """
        columns = self._columns()
        for name in self._types:
            number = 0
            while ids := self._missing(columns, name):
                number += 1
                yield self._ask(name, ids, number)

    def _ask(self, name: str, ids: Sequence[str], number: int) -> HydratedBatch:
        found = set()

        def given() -> Iterator[Record | RejectedInput]:
            for item in self._source.fetch_ids(name, ids):
                found.add(item.id if isinstance(item, Record) else item.resource_id)
                yield item

        received = self._receiver.receive(given(), f"missing:{self._run_id}/{name}/{number}")
        lacking = [identity for identity in ids if identity not in found][:READS_AT_ONCE]
        gone = list(self._source.find_deleted(name, lacking))
        self._receiver.deletion_log.record(gone, run_id=self._run_id)
        with self._connect() as conn:
            quality.record_requests(conn, self._run_id, name, ids)
        return HydratedBatch(name, len(ids), len(found), received, len(gone))

    def _missing(self, columns: Sequence[quality.ReferenceColumn], name: str) -> list[str]:
        with self._connect() as conn:
            return [identity for identity, _ in quality.find_missing_ids(conn, columns, name, limit=IDS_AT_ONCE)]

    def _columns(self) -> list[quality.ReferenceColumn]:
        with self._connect() as conn:
            quality.forget_loaded_requests(conn)
            there = quality.existing_tables(conn, self._views)
            fitting = [view for view in self._views if view.name in there and not view_tables.find_drift(conn, view)]
        return [column for view in fitting for column in quality.find_reference_columns(view)]
