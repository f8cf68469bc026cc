"""Compares a source with the store and the tables on demand: by totals, or by the ids and versions of all resources."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Protocol, runtime_checkable

from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.fhir.validation.primitives import is_id
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.reconcile.window_counts import WindowCounts, find_main_view, list_windows, reconcile
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import checkpoints
from fhir_assets.warehouse.postgres.db.connections import Session
from fhir_assets.warehouse.postgres.queries import source_comparison
from fhir_assets.warehouse.postgres.queries.source_comparison import AccountedCounts, SourceVersion
from fhir_assets.windows import Interval, WindowScheme

MAX_NAMED = 1000
"""The largest number of missing resources of a type that are named; all of them are counted."""

_VERSIONS_PER_QUERY = 2000
_END = datetime(2200, 1, 1, tzinfo=UTC)
"""Later than any ``lastUpdated``. Resources dated after it are not due."""


@runtime_checkable
class ComparableSource(Protocol):
    """A source that can return all resources of a type, regardless of their dates."""

    def count_all(self, resource_type: str) -> int | None:
        """Return the number of resources as declared by the source; None if it declares none."""
        ...

    def count(self, resource_type: str, interval: Interval) -> int | None:
        """Return the number of resources in ``interval`` as declared by the source; None if it declares none."""
        ...

    def fetch_all(self, resource_type: str) -> Iterator[Record | RejectedInput]:
        """Stream all resources of the type."""
        ...


@dataclass(frozen=True, slots=True)
class TypeComparison:
    """One resource type of the source, compared with the store and the tables."""

    resource_type: str
    accounted: AccountedCounts
    source_total: int | None = None
    """The number of resources in the source: its own total, or the number that it returned; None if it reports no
    total.
    """
    older: int | None = 0
    """Resources older than FHIR_LAST_UPDATED_GTE, which are not loaded; None if the source does not count them."""
    due: int | None = 0
    """Resources that were updated after the last load; None if the source does not count them."""
    missing: int | None = None
    """Resources that are not accounted for, without ``older`` and ``due``; None if it is unknown."""
    surplus: int | None = None
    """Resources of the tables that the source does not have: it deleted them, or they came through another channel.

    The actual number is larger if other resources are missing. None if it is unknown, as after a deep comparison.
    """
    missing_ids: tuple[str, ...] = ()
    """The logical ids of the first missing resources; only a deep comparison finds them."""
    unreconciled_windows: tuple[WindowCounts, ...] = ()
    """The windows of the store whose counts do not match."""

    @property
    def complete(self) -> bool:
        """Whether everything that the source has is accounted for. Unknown is not complete."""
        return self.missing == 0 and not self.unreconciled_windows


def compare_type(
    conn: Session,
    source: ComparableSource,
    store: Store,
    views: Sequence[View],
    scheme: WindowScheme,
    resource_type: str,
    *,
    deep: bool,
) -> TypeComparison:
    """Compare one resource type. A deep comparison reads all resources of the source, as a stream.

    Raises the errors of the source, StoreError and DatabaseUnavailable.
    """
    keys = list_windows(store, resource_type)
    windows = reconcile(conn, store, resource_type, keys, main_view=find_main_view(views, resource_type))
    unreconciled = tuple(window for window in windows if window.faults)
    checkpoint = checkpoints.get(conn, [resource_type]).get(resource_type)
    loaded_until = checkpoint.loaded_until if checkpoint else None
    start = None if scheme.open_start else scheme.start
    conn.commit()
    accounted = source_comparison.count_accounted(conn, resource_type)
    comparison = TypeComparison(resource_type, accounted, unreconciled_windows=unreconciled)
    if deep:
        return _compare_versions(conn, source.fetch_all(resource_type), comparison, start, loaded_until)
    total = source.count_all(resource_type)
    older = source.count(resource_type, Interval(None, start)) if start and total else 0
    due = source.count(resource_type, Interval(loaded_until, _END)) if loaded_until and total else 0
    if total is None or older is None or due is None:
        return replace(comparison, source_total=total, older=older, due=due)
    difference = total - older - due - accounted.total
    return replace(
        comparison,
        source_total=total,
        older=older,
        due=due,
        missing=max(0, difference),
        surplus=max(0, -difference),
    )


def _compare_versions(
    conn: Session,
    items: Iterable[Record | RejectedInput],
    comparison: TypeComparison,
    start: datetime | None,
    loaded_until: datetime | None,
) -> TypeComparison:
    """Look up all versions of the source in batches, and count those that are not accounted for.

    The dead letters of resources without a valid id have no id, so that only their numbers can be compared.
    """
    total = older = due = missing = without_id = 0
    named: list[str] = []
    remaining = iter(items)
    while batch := list(islice(remaining, _VERSIONS_PER_QUERY)):
        total += len(batch)
        versions = [_read_version(item) for item in batch]
        for version in source_comparison.find_missing(conn, comparison.resource_type, versions):
            if start and version.last_updated and version.last_updated < start:
                older += 1
            elif loaded_until and version.last_updated and loaded_until <= version.last_updated < _END:
                due += 1
            elif not is_id(version.id):
                without_id += 1
            else:
                missing += 1
                if len(named) < MAX_NAMED:
                    named.append(version.id)
        conn.commit()
    if without_id:
        missing += max(0, without_id - source_comparison.count_dead_without_id(conn, comparison.resource_type))
    return replace(comparison, source_total=total, older=older, due=due, missing=missing, missing_ids=tuple(named))


def _read_version(item: Record | RejectedInput) -> SourceVersion:
    """Return the version of an item.

    The version of a rejected item is newer than any row, because only a dead letter accounts for it.
    """
    if isinstance(item, RejectedInput):
        return SourceVersion(item.resource_id or "", None, _END)
    return SourceVersion(item.id, item.version_id, item.last_updated)
