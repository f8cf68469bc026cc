"""Commits partitions: merges new manifests with the current ones and writes them, under locks that all machines share.

Two runs may work on the same partition concurrently (a load and a landing file, a backfill and the schedule). Each run
builds its new manifest from the manifest that it read at its start, its *base*. Later commits of other runs are merged,
not overwritten. If they cannot be merged, the commit raises Overtaken and changes nothing.

Dead letters that did not fail again are resolved in the transaction that holds the locks, after the manifests are
written, and only in partitions whose committed manifest is from the run. If a run is killed in between, they stay open,
and the next complete validation resolves them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Protocol

import msgspec

from fhir_assets.errors import Overtaken
from fhir_assets.sources import DEFAULT_SOURCE
from fhir_assets.storage.manifest import REPLAY, Fetch, Fetched, Manifest, Part
from fhir_assets.storage.store import Store, partition_folder
from fhir_assets.warehouse.ops import partition_rows, window_verdicts
from fhir_assets.warehouse.ops.dead_letter_resolution import DeadLetterResolution, resolve_dead_letters
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession
from fhir_assets.warehouse.postgres.db.partition_locks import lock_partitions

_PARTITIONS_PER_TRANSACTION = 100
_RECONCILED_LAYERS = ("raw", "validated")
_Rows = Callable[[Manifest], int | None]


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

    @property
    def resolution(self) -> DeadLetterResolution | None:
        """The dead letters to resolve in the partitions that were processed completely, if there are any."""
        ...


def commit_update(connect: OpenSession, store: Store, update: PartitionUpdate) -> list[Manifest]:
    """Commit the manifests of an update, each in one atomic step, and return them as committed.

    Raises Overtaken if another run's commit cannot be merged, DatabaseUnavailable, or StoreError.
    """
    base_manifests = update.base_manifests

    def merge(new: Manifest, current: Manifest | None) -> Manifest:
        return merge_manifests(new, base_manifests.get(new.partition_key), current)

    return rewrite_partitions(connect, store, update.manifests, merge, resolution=update.resolution)


def rewrite_partitions(
    connect: OpenSession,
    store: Store,
    manifests: Sequence[Manifest],
    merge: Callable[[Manifest, Manifest | None], Manifest],
    *,
    resolution: DeadLetterResolution | None = None,
) -> list[Manifest]:
    """Replace partitions while their locks are held, and return the manifests as committed.

    ``merge`` receives each new manifest and the current one (None for a new partition) and returns the one to commit.
    The ``resolution`` is applied to the partitions whose committed manifest is from the run of the new one.
    """
    written: list[Manifest] = []
    with connect() as conn:
        for start in range(0, len(manifests), _PARTITIONS_PER_TRANSACTION):
            group = manifests[start : start + _PARTITIONS_PER_TRANSACTION]
            with _partition_locks(conn, store.source, group):
                present = store.committed_manifests(group)
                merged = [merge(new, current) for new, current in zip(group, present, strict=True)]
                changed = [new for new, current in zip(merged, present, strict=True) if _changes_window(new, current)]
                # The change is recorded before the manifests are written, in case this process is killed, and after it.
                if changed:
                    with connect() as other:
                        _record_change(other, changed, rows=lambda _: None)
                        other.commit()
                store.commit(merged)
                _record_change(conn, changed, rows=lambda manifest: manifest.rows)
                if resolution is not None:
                    own = [m.partition_key for new, m in zip(group, merged, strict=True) if m.run_id == new.run_id]
                    resolve_dead_letters(conn, resolution.restrict(own))
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
    """Keep received parts and every interval that another run fetched in the meantime.

    A run that extended its base appends its parts. A run that read the window from its start replaces the fetched parts
    of its base, but not those that others have appended to the base since, because those were fetched later. If two
    runs read the window from its start, the result of the run that read up to a later time is kept.

    Raises Overtaken if a complete window would be fetched up to an earlier time than before.
    """
    if current is None:
        return new
    if base is not None and _continues(new, base):
        return new if current == base else _append(new, base, current)
    received = tuple(part for part in current.parts if part.origin is not None)
    own = _fetched_parts(new)
    replaced = msgspec.structs.replace(new, parts=own + received, receipts=current.receipts)
    if current.fetched is None or new.fetched is None:
        return replaced
    if base is None or not _continues(current, base):
        return current if _fetched_until(current.fetched) > _fetched_until(new.fetched) else replaced
    later = tuple(part for part in _added_parts(current, base) if part.origin is None)
    fetches = current.fetched.fetches[len(base.fetched.fetches) :] if base.fetched else ()
    fetched = _join_fetches(new.fetched, fetches, complete=current.fetched.complete)
    if current.fetched.complete and not fetched.complete and fetched.until < current.fetched.until:
        raise Overtaken(
            f"{new.resource_type} of {new.partition_key} is complete, but this run fetched it only up to "
            f"{fetched.until:%Y-%m-%d %H:%M}, because another run loaded it at the same time or the source is behind: "
            "start this run again"
        )
    return msgspec.structs.replace(replaced, parts=own + later + received, fetched=fetched)


def _append(new: Manifest, base: Manifest, current: Manifest) -> Manifest:
    """Append the parts and fetches that a run added to its base to the current partition."""
    if new.fetched is None or current.fetched is None or base.fetched is None:
        received = tuple(part for part in current.parts if part.origin is not None)
        return msgspec.structs.replace(new, parts=_fetched_parts(new) + received, receipts=current.receipts)
    fetches = new.fetched.fetches[len(base.fetched.fetches) :]
    fetched = _join_fetches(current.fetched, fetches, complete=new.fetched.complete)
    return msgspec.structs.replace(
        new,
        parts=current.parts + _added_parts(new, base),
        fetched=msgspec.structs.replace(fetched, source_state=new.fetched.source_state),
        receipts=current.receipts,
    )


def _fetched_parts(manifest: Manifest) -> tuple[Part, ...]:
    return tuple(part for part in manifest.parts if part.origin is None)


def _continues(manifest: Manifest, base: Manifest) -> bool:
    """Return whether a raw partition contains all fetches and fetched parts of ``base``."""
    if manifest.fetched is None or base.fetched is None:
        return False
    parts = set(_fetched_parts(manifest))
    fetches = manifest.fetched.fetches[: len(base.fetched.fetches)]
    return fetches == base.fetched.fetches and parts.issuperset(_fetched_parts(base))


def _fetched_until(fetched: Fetched) -> tuple[datetime, datetime]:
    """Return the time up to which a window was fetched, and the time of its last fetch."""
    return fetched.until, max((fetch.at for fetch in fetched.fetches), default=fetched.until)


def _join_fetches(fetched: Fetched, later: Sequence[Fetch], *, complete: bool) -> Fetched:
    """Append the ``later`` fetches. ``until`` is extended by those that leave no gap.

    ``complete`` states whether the ``later`` fetches complete the window.
    """
    until, is_complete = fetched.until, fetched.complete
    for fetch in later:
        if (fetch.start is None or fetch.start <= until) and fetch.end >= until:
            until, is_complete = fetch.end, is_complete or complete
    return msgspec.structs.replace(fetched, until=until, complete=is_complete, fetches=(*fetched.fetches, *later))


def _merge_validated(new: Manifest, base: Manifest | None, current: Manifest | None) -> Manifest:
    """Keep the manifest whose inputs include those of the other one, or merge two extensions by different inputs.

    A complete validation since the base also covers the dead letters that a replay validated on the base.
    """
    if current is None or current == base or new.validated is None or current.validated is None:
        return new
    if _is_replay_before(current, new, base):
        return current
    if _is_replay_before(new, current, base):
        return new
    same_rules = new.validated.rules_version == current.validated.rules_version
    new_inputs, current_inputs = set(new.validated.inputs), set(current.validated.inputs)
    if same_rules and current_inputs >= new_inputs:
        return current
    if new_inputs >= current_inputs or _covers_extension(new, current, base):
        return new
    if _covers_extension(current, new, base):
        return current
    common = base.validated if base else None
    common_inputs = set(common.inputs) if common else set()
    extended = all(_extends(manifest, base) for manifest in (new, current))
    if not same_rules or not extended or (new_inputs & current_inputs) - common_inputs:
        raise Overtaken(
            f"another run validated {new.resource_type} of {new.partition_key} at the same time, from other raw "
            "parts: start this run again"
        )
    dead = _add_counts(current.validated.dead, new.validated.dead, common.dead if common else {})
    if any(count < 0 for count in dead.values()):
        raise Overtaken(
            f"another run replayed the same dead letters of {new.resource_type} of {new.partition_key} at the same "
            "time: start this run again if dead letters are left"
        )
    return msgspec.structs.replace(
        new,
        parts=current.parts + (_added_parts(new, base) if base else new.parts),
        validated=msgspec.structs.replace(
            new.validated,
            inputs=(*current.validated.inputs, *(name for name in new.validated.inputs if name not in current_inputs)),
            rows_in=current.validated.rows_in + new.validated.rows_in - (common.rows_in if common else 0),
            dead=dead,
            warnings=_add_counts(current.validated.warnings, new.validated.warnings, common.warnings if common else {}),
        ),
    )


def _is_replay_before(complete: Manifest, replay: Manifest, base: Manifest | None) -> bool:
    """Return whether one manifest validates all parts again, and the other one only adds replays to the base."""
    if base is None or base.validated is None or complete.validated is None or replay.validated is None:
        return False
    added = set(replay.validated.inputs).difference(base.validated.inputs)
    return (
        bool(added)
        and all(name.startswith(REPLAY) for name in added)
        and _extends(replay, base)
        and not _extends(complete, base)
        and complete.validated.raw_parts >= replay.validated.raw_parts
    )


def _covers_extension(complete: Manifest, extension: Manifest, base: Manifest | None) -> bool:
    """Return whether one manifest validates all parts anew, and with them those that the other one adds to the base."""
    if base is None or base.validated is None or complete.validated is None or extension.validated is None:
        return False
    added = set(extension.validated.inputs).difference(base.validated.inputs)
    return (
        complete.validated.rules_version == extension.validated.rules_version
        and _extends(extension, base)
        and not _extends(complete, base)
        and added.issubset(complete.validated.inputs)
    )


def _extends(manifest: Manifest, base: Manifest | None) -> bool:
    """Return whether a validated manifest only adds to its base."""
    if base is None:
        return True
    if base.validated is None or manifest.validated is None:
        return False
    names = {part.name for part in manifest.parts}
    same_origin = manifest.validated.complete_run == base.validated.complete_run
    return same_origin and names.issuperset(part.name for part in base.parts)


def _added_parts(new: Manifest, base: Manifest) -> tuple[Part, ...]:
    base_names = {part.name for part in base.parts}
    return tuple(part for part in new.parts if part.name not in base_names)


def _add_counts(current: Mapping[str, int], new: Mapping[str, int], common: Mapping[str, int]) -> dict[str, int]:
    """Add the counts by rule of two manifests, less those of the base that both contain."""
    total = Counter(current)
    total.update(new)
    total.subtract(common)
    return {rule: count for rule, count in total.items() if count}


def _changes_window(new: Manifest, current: Manifest | None) -> bool:
    """Return whether a manifest changes the contents of its partition, not only the time up to which it is fetched."""
    if current is None:
        return True
    fetched = {"run_id": new.run_id, "written_at": new.written_at, "fetched": new.fetched}
    return msgspec.structs.replace(current, **fetched) != new


def _record_change(conn: Connection, manifests: Sequence[Manifest], *, rows: _Rows) -> None:
    """Invalidate the verdicts of the windows, and record the number of resources in their partitions."""
    by_partitions: defaultdict[tuple[str, str], dict[str, int | None]] = defaultdict(dict)
    for manifest in manifests:
        if manifest.layer in _RECONCILED_LAYERS:
            by_partitions[manifest.resource_type, manifest.layer][manifest.partition_key] = rows(manifest)
    for (resource_type, layer), rows_by_partition in sorted(by_partitions.items()):
        window_verdicts.invalidate(conn, resource_type, list(rows_by_partition))
        partition_rows.record(conn, layer, resource_type, rows_by_partition)


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
