"""Fetches missing references into raw: resources that loaded resources refer to but that are not loaded."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fhir_assets.catalog import LOAD_ORDER
from fhir_assets.fhir.record import Deletion, Record, RejectedInput
from fhir_assets.fhir.views import ReferenceColumn, View, find_reference_columns
from fhir_assets.notices import Notice, log_notices
from fhir_assets.pipeline.receive.receiver import Received, Receiver
from fhir_assets.pipeline.type_failures import TypeFailures
from fhir_assets.warehouse.postgres.db.connections import OpenSession
from fhir_assets.warehouse.postgres.queries import references
from fhir_assets.warehouse.postgres.tables import view_tables

IDS_PER_BATCH = 5000
"""The number of missing ids that are looked up and fetched in one batch."""

MAX_READS_PER_BATCH = 500
"""The maximum number of ids that are read one by one, because a search did not return them and they may be deleted."""

FIRST_TYPES = ("Consent", "Patient")
"""The types whose missing resources are fetched first, in this order: Consents have to be loaded before the resources
that they may withhold, and most other types refer to Patients.
"""


@runtime_checkable
class ReadsById(Protocol):
    """A source that can read resources by id."""

    def fetch_ids(self, resource_type: str, ids: Sequence[str]) -> Iterator[Record | RejectedInput]:
        """Yield the resources with these ids that the source has."""
        ...

    def find_deleted(self, resource_type: str, ids: Sequence[str]) -> Iterator[Deletion]:
        """Yield the deletions of the resources with these ids that the source deleted."""
        ...

    def drain_notices(self) -> tuple[Notice, ...]:
        """Return the notices since the last call."""
        ...


@dataclass(frozen=True, slots=True)
class MissingReferencesBatch:
    """The result of one batch of missing ids of one type."""

    resource_type: str
    requested: int
    """Ids that were requested."""
    found: int
    """Ids for which the source returned a resource."""
    received: Received
    """The resources as they were received into raw."""
    deleted: int = 0
    """Ids that the source has deleted. They are recorded as deletions and are not requested again."""


class MissingReferencesStep:
    """Fetches resources that loaded resources refer to but that are not loaded."""

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
        self._types = sorted(
            resource_types, key=lambda name: (*(name != first for first in FIRST_TYPES), LOAD_ORDER[name])
        )
        self._source = source
        self._receiver = receiver
        self._run_id = run_id
        self._batches = Counter[str]()

    def run(self) -> Iterator[MissingReferencesBatch]:
        """Fetch all missing resources, FIRST_TYPES first, and yield the result of each batch once it is in raw.

        An id is requested at most once a day. Raises the errors of the receiver immediately, and those of the source
        after the other types are fetched. Another call fetches what the resources that were loaded in the meantime
        refer to.
        """
        columns = self._find_columns()
        failures = TypeFailures()
        for name in self._types:
            while name not in failures and (ids := self._find_missing(columns, name)):
                batch = None
                with failures.collect(name):
                    batch = self._fetch(name, ids)
                if batch:
                    yield batch
        log_notices(self._source.drain_notices())
        failures.raise_collected()

    def _fetch(self, name: str, ids: Sequence[str]) -> MissingReferencesBatch:
        self._batches[name] += 1
        found_ids = set()

        def fetch() -> Iterator[Record | RejectedInput]:
            for item in self._source.fetch_ids(name, ids):
                found_ids.add(item.id if isinstance(item, Record) else item.resource_id)
                yield item

        received = self._receiver.receive(
            fetch(), f"missing:{self._run_id}/{name}/{self._batches[name]}", run_id=self._run_id
        )
        not_found = [identity for identity in ids if identity not in found_ids][:MAX_READS_PER_BATCH]
        deleted = list(self._source.find_deleted(name, not_found))
        self._receiver.deletion_log.record(deleted, run_id=self._run_id)
        with self._connect() as conn:
            references.record_requests(conn, self._run_id, name, ids)
        return MissingReferencesBatch(name, len(ids), len(found_ids), received, len(deleted))

    def _find_missing(self, columns: Sequence[ReferenceColumn], name: str) -> list[str]:
        with self._connect() as conn:
            return [identity for identity, _ in references.find_missing_ids(conn, columns, name, limit=IDS_PER_BATCH)]

    def _find_columns(self) -> list[ReferenceColumn]:
        with self._connect() as conn:
            references.forget_loaded_requests(conn)
            existing = view_tables.find_existing_tables(conn, self._views)
            current_views = [
                view for view in self._views if view.name in existing and not view_tables.find_drift(conn, view)
            ]
        return [column for view in current_views for column in find_reference_columns(view)]
