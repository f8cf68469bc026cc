"""Partitions become visible: each is read, merged and written under a lock that all machines share.

Two runs may work on one window at once (a load and a landing file, a backfill and the schedule). Each made its
manifest from the one it read at its beginning, its *base*. What others committed since is merged, never overwritten;
where it cannot be, the commit raises Overtaken and changes nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Protocol

import msgspec

from fhir_assets.errors import Overtaken
from fhir_assets.storage.manifest import Manifest, Part
from fhir_assets.storage.store import Store, folder
from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Connection, Session

_AT_ONCE = 100
"""How many partitions are committed under one transaction's locks."""


class PartitionUpdate(Protocol):
    """New partitions of one type, written but not yet visible."""

    @property
    def resource_type(self) -> str: ...

    @property
    def manifests(self) -> tuple[Manifest, ...]: ...

    @property
    def bases(self) -> Mapping[str, Manifest | None]: ...


def commit_update(connect: Callable[[], Session], store: Store, update: PartitionUpdate) -> list[Manifest]:
    """Make the partitions of an update visible, each in one step; returns them as they are now.

    Raises Overtaken where another run's work cannot be kept beside it, DatabaseUnavailable, or StoreError.
    """
    bases = update.bases
    return rewrite_partitions(
        connect, store, update.manifests, lambda mine, now: merge_manifests(mine, bases.get(mine.partition_key), now)
    )


def rewrite_partitions(
    connect: Callable[[], Session],
    store: Store,
    manifests: Sequence[Manifest],
    merge: Callable[[Manifest, Manifest | None], Manifest],
) -> list[Manifest]:
    """Replace partitions by what ``merge`` makes of each new manifest and the present one, under their locks."""
    written: list[Manifest] = []
    with closing(connect()) as conn:
        for start in range(0, len(manifests), _AT_ONCE):
            group = manifests[start : start + _AT_ONCE]
            with _locked(conn, group):
                results = [merge(mine, now) for mine, now in zip(group, store.present(group), strict=True)]
                store.commit(results)
            written += results
    return written


def merge_manifests(mine: Manifest, base: Manifest | None, now: Manifest | None) -> Manifest:
    """A run's manifest beside what became of the partition since the run read ``base``. Raises Overtaken."""
    if mine.layer == "raw":
        return _merged_raw(mine, base, now)
    return _merged_validated(mine, base, now)


def _merged_raw(mine: Manifest, base: Manifest | None, now: Manifest | None) -> Manifest:
    """What was received stays, whatever was fetched; an extension is put at the end of what is there."""
    if now is None or now == base:
        return mine
    received = tuple(part for part in now.parts if part.origin is not None)
    fetched = mine.fetched
    if base is None or base.fetched is None or fetched is None or now.fetched is None:
        parts = tuple(part for part in mine.parts if part.origin is None)
        return msgspec.structs.replace(mine, parts=parts + received, receipts=now.receipts)
    before = base.fetched.fetches
    fetches = fetched.fetches[len(before) :]
    until = now.fetched.until
    complete = now.fetched.complete
    for fetch in fetches:
        if (fetch.start is None or fetch.start <= until) and fetch.end >= until:
            until, complete = fetch.end, complete or fetched.complete
    return msgspec.structs.replace(
        mine,
        parts=now.parts + _added(mine, base),
        fetched=msgspec.structs.replace(
            fetched, until=until, complete=complete, fetches=(*now.fetched.fetches, *fetches)
        ),
        receipts=now.receipts,
    )


def _merged_validated(mine: Manifest, base: Manifest | None, now: Manifest | None) -> Manifest:
    if now is None or now == base or mine.validated is None or now.validated is None:
        return mine
    same_rules = mine.validated.rules_version == now.validated.rules_version
    ours, theirs = set(mine.validated.inputs), set(now.validated.inputs)
    if same_rules and theirs >= ours:
        return now
    if ours >= theirs:
        return mine
    common = base.validated if base else None
    before = set(common.inputs) if common else set()
    old = {part.name for part in base.parts} if base else set()
    extended = all(old.issubset(part.name for part in each.parts) for each in (mine, now))
    if not same_rules or not extended or (ours & theirs) - before:
        raise Overtaken(
            f"another run validated {mine.resource_type} of {mine.partition_key} in the meantime, from other raw "
            "parts: run it again"
        )
    return msgspec.structs.replace(
        mine,
        parts=now.parts + (_added(mine, base) if base else mine.parts),
        validated=msgspec.structs.replace(
            mine.validated,
            inputs=(*now.validated.inputs, *(name for name in mine.validated.inputs if name not in theirs)),
            rows_in=now.validated.rows_in + mine.validated.rows_in - (common.rows_in if common else 0),
            dead=_sum(now.validated.dead, mine.validated.dead, common.dead if common else {}),
            warnings=_sum(now.validated.warnings, mine.validated.warnings, common.warnings if common else {}),
        ),
    )


def _added(mine: Manifest, base: Manifest) -> tuple[Part, ...]:
    known = {part.name for part in base.parts}
    return tuple(part for part in mine.parts if part.name not in known)


def _sum(theirs: Mapping[str, int], ours: Mapping[str, int], common: Mapping[str, int]) -> dict[str, int]:
    total = Counter(theirs)
    total.update(ours)
    total.subtract(common)
    return {rule: count for rule, count in total.items() if count}


@contextmanager
def _locked(conn: Connection, manifests: Sequence[Manifest]) -> Iterator[None]:
    """Hold the partitions' locks, taken in one order everywhere so that two commits never wait crosswise."""
    names = [folder(each.layer, each.resource_type, each.partition_key) for each in manifests]
    with conn.transaction():
        conn.execute(
            "SELECT pg_advisory_xact_lock(%s, key) FROM"
            " (SELECT DISTINCT hashtext(name) AS key FROM unnest(%s::text[]) AS name ORDER BY 1) AS keys",
            [advisory_locks.PARTITION_COMMIT, names],
        )
        yield
