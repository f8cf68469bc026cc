"""Commit partitions: merge new manifests with the current ones and write them, under locks that all machines share.

Two runs may work on the same partition at once (a load and a landing file, a backfill and the schedule). Each run
builds its new manifest from the manifest that it read at its start, its *base*. Later commits of other runs are merged,
not overwritten. If they cannot be merged, the commit raises Overtaken and changes nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import msgspec

from fhir_assets.errors import Overtaken
from fhir_assets.sources import DEFAULT_SOURCE
from fhir_assets.storage.manifest import Manifest, Part
from fhir_assets.storage.store import Store, partition_folder
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession
from fhir_assets.warehouse.postgres.db.partition_locks import lock_partitions

_PARTITIONS_PER_TRANSACTION = 100


class PartitionUpdate(Protocol):
    """New partitions of one resource type whose parts are written and whose manifests are not committed yet."""

    @property
    def resource_type(self) -> str:
        """The type of the resources in the partitions."""
        ...

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """The manifests to commit."""
        ...

    @property
    def base_manifests(self) -> Mapping[str, Manifest | None]:
        """By partition key, the manifest from which the new one was built; None for a new partition."""
        ...


def commit_update(connect: OpenSession, store: Store, update: PartitionUpdate) -> list[Manifest]:
    """Commit the manifests of an update, each in one atomic step, and return them as committed.

    Raises Overtaken if another run's commit cannot be merged, DatabaseUnavailable, or StoreError.
    """
    base_manifests = update.base_manifests

    def merge(new: Manifest, current: Manifest | None) -> Manifest:
        return merge_manifests(new, base_manifests.get(new.partition_key), current)

    return rewrite_partitions(connect, store, update.manifests, merge)


def rewrite_partitions(
    connect: OpenSession,
    store: Store,
    manifests: Sequence[Manifest],
    merge: Callable[[Manifest, Manifest | None], Manifest],
) -> list[Manifest]:
    """Replace partitions while their locks are held, and return the manifests as committed.

    ``merge`` receives each new manifest and the current one (None for a new partition) and returns the one to commit.
    """
    written: list[Manifest] = []
    with connect() as conn:
        for start in range(0, len(manifests), _PARTITIONS_PER_TRANSACTION):
            group = manifests[start : start + _PARTITIONS_PER_TRANSACTION]
            with _partition_locks(conn, store.source, group):
                merged = [
                    merge(new, current) for new, current in zip(group, store.committed_manifests(group), strict=True)
                ]
                store.commit(merged)
            written += merged
    return written


def merge_manifests(new: Manifest, base: Manifest | None, current: Manifest | None) -> Manifest:
    """Merge a run's new manifest with the commits of other runs.

    ``base`` is the manifest that the run read at its start, ``current`` the one that is committed now; None where the
    partition does not exist. Raises Overtaken if both changes cannot be kept.
    """
    if new.layer == "raw":
        return _merge_raw(new, base, current)
    return _merge_validated(new, base, current)


def _merge_raw(new: Manifest, base: Manifest | None, current: Manifest | None) -> Manifest:
    """Keep received parts. Append the new parts if the run extended its base; otherwise replace the fetched parts."""
    if current is None or current == base:
        return new
    received = tuple(part for part in current.parts if part.origin is not None)
    fetched = new.fetched
    if base is None or base.fetched is None or fetched is None or current.fetched is None:
        parts = tuple(part for part in new.parts if part.origin is None)
        return msgspec.structs.replace(new, parts=parts + received, receipts=current.receipts)
    base_fetches = base.fetched.fetches
    fetches = fetched.fetches[len(base_fetches) :]
    until = current.fetched.until
    complete = current.fetched.complete
    for fetch in fetches:
        if (fetch.start is None or fetch.start <= until) and fetch.end >= until:
            until, complete = fetch.end, complete or fetched.complete
    return msgspec.structs.replace(
        new,
        parts=current.parts + _added_parts(new, base),
        fetched=msgspec.structs.replace(
            fetched, until=until, complete=complete, fetches=(*current.fetched.fetches, *fetches)
        ),
        receipts=current.receipts,
    )


def _merge_validated(new: Manifest, base: Manifest | None, current: Manifest | None) -> Manifest:
    """Keep the manifest whose inputs include those of the other one, or merge two extensions by different inputs."""
    if current is None or current == base or new.validated is None or current.validated is None:
        return new
    same_rules = new.validated.rules_version == current.validated.rules_version
    new_inputs, current_inputs = set(new.validated.inputs), set(current.validated.inputs)
    if same_rules and current_inputs >= new_inputs:
        return current
    if new_inputs >= current_inputs:
        return new
    common = base.validated if base else None
    common_inputs = set(common.inputs) if common else set()
    base_parts = {part.name for part in base.parts} if base else set()
    extended = all(base_parts.issubset(part.name for part in manifest.parts) for manifest in (new, current))
    if not same_rules or not extended or (new_inputs & current_inputs) - common_inputs:
        raise Overtaken(
            f"another run validated {new.resource_type} of {new.partition_key} at the same time, from other raw "
            "parts: start this run again"
        )
    return msgspec.structs.replace(
        new,
        parts=current.parts + (_added_parts(new, base) if base else new.parts),
        validated=msgspec.structs.replace(
            new.validated,
            inputs=(*current.validated.inputs, *(name for name in new.validated.inputs if name not in current_inputs)),
            rows_in=current.validated.rows_in + new.validated.rows_in - (common.rows_in if common else 0),
            dead=_add_counts(current.validated.dead, new.validated.dead, common.dead if common else {}),
            warnings=_add_counts(current.validated.warnings, new.validated.warnings, common.warnings if common else {}),
        ),
    )


def _added_parts(new: Manifest, base: Manifest) -> tuple[Part, ...]:
    base_names = {part.name for part in base.parts}
    return tuple(part for part in new.parts if part.name not in base_names)


def _add_counts(current: Mapping[str, int], new: Mapping[str, int], common: Mapping[str, int]) -> dict[str, int]:
    """Add the counts by rule of two manifests, less those of the base that both contain."""
    total = Counter(current)
    total.update(new)
    total.subtract(common)
    return {rule: count for rule, count in total.items() if count}


@contextmanager
def _partition_locks(conn: Connection, source: str, manifests: Sequence[Manifest]) -> Iterator[None]:
    """Hold the locks of the partitions. All commits take them in the same order, so that they cannot deadlock."""
    prefix = "" if source == DEFAULT_SOURCE else f"{source}/"
    names = [
        prefix + partition_folder(manifest.layer, manifest.resource_type, manifest.partition_key)
        for manifest in manifests
    ]
    with conn.transaction():
        lock_partitions(conn, names)
        yield
