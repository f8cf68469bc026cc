"""Transitions of a source to changed settings: carries its state over, or removes it and starts over.

A transition first changes the store, and then the database in one transaction, which also binds the new settings. If it
is interrupted, it can be repeated; loads are refused until it is complete.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from fhir_assets.errors import ConfigurationError
from fhir_assets.pipeline.deletions.deletion_log import LAYER as DELETED
from fhir_assets.pipeline.sources.binding import Change, Effect, SourceBinding
from fhir_assets.pipeline.sources.received_parts import is_window, keep_received, move_received
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.storage.aside import copy_aside, read_all_manifests, remove_manifest
from fhir_assets.storage.manifest import Manifest
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import audit_log, partition_rows, runs, source_state
from fhir_assets.warehouse.ops.received import ReceivedWindow
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession

_BULK = "bulk"


@dataclass(frozen=True, slots=True)
class TransitionResult:
    """The result of a transition.

    ``changes`` are messages. ``set_aside`` counts partitions of raw and validated, ``removed`` resources of the tables,
    and ``received`` the received windows that have to be loaded again.
    """

    changes: tuple[str, ...]
    set_aside: int = 0
    removed: int = 0
    received: int = 0


@dataclass(frozen=True, slots=True)
class _Rearranged:
    set_aside: int
    windows: Mapping[str, Sequence[ReceivedWindow]]
    old_keys: tuple[str, ...]


class SourceTransition:
    """Adapts the state of a source to changed settings."""

    def __init__(
        self,
        binding: SourceBinding,
        connect: OpenSession,
        store: Store,
        *,
        actor: str,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._binding = binding
        self._connect = connect
        self._store = store
        self._actor = actor
        self._now = now

    def carry_over(self) -> TransitionResult:
        """Keep the tables and all state that is valid under the current settings, and bind these settings.

        - Another server: everything is kept; the caller confirms that it has the same data under another address.
        - Other windows (FHIR_PARTITION): fetched partitions are set aside, received ones are moved into the new
          windows. Checkpoints are times and stay valid; the window that contains one is fetched from its start.
        - Another start (FHIR_LAST_UPDATED_GTE): an earlier one removes the checkpoints, so that the windows before the
          old start are loaded and complete windows are skipped; for a later one, older partitions are set aside.
        - Other coverage (FHIR_SOURCE, FHIR_BULK_LEVEL, …): every window is fetched again, because the earlier fetches
          may have excluded resources.
        - Another store or database: they are assigned to each other.

        Raises ConfigurationError if a load is running, StoreError or DatabaseUnavailable.
        """
        with self._connect() as conn:
            _refuse_running(conn)
            changes, problems = self._binding.find_changes(conn)
            effects = {change.setting.effect for change in changes}
            rearranged = _Rearranged(0, {}, ())
            if effects & {Effect.WINDOWS, Effect.COVERAGE, Effect.START}:
                rearranged = self._rearrange(strip=Effect.COVERAGE in effects, move=Effect.WINDOWS in effects)
            self._carry_database_over(conn, changes, rearranged)
            received = 0
            if effects & {Effect.WINDOWS, Effect.COVERAGE}:
                source_state.remove_loaded_parts(conn)
                received = source_state.request_received(conn)
            self._forget_counts(conn)
            _refuse_started(conn)
            self._binding.rebind(conn)
        return TransitionResult((*map(str, changes), *problems), rearranged.set_aside, 0, received)

    def start_anew(self) -> TransitionResult:
        """Remove what was loaded from the source, and bind the current settings.

        The tables, checkpoints, loaded parts, exports and deletions of the source are removed, and its partitions are
        set aside. Inputs of other channels stay in raw; they have to be validated and loaded again.

        Raises ConfigurationError if a load is running, StoreError or DatabaseUnavailable.
        """
        with self._connect() as conn:
            _refuse_running(conn)
            changes, problems = self._binding.find_changes(conn)
            moves = any(change.setting.effect in (Effect.WINDOWS, Effect.START) for change in changes)
            origins = source_state.list_origins(conn)
            rearranged = self._rearrange(strip=True, move=moves, deletions=True, dropped=origins)
            source_state.remove_state(conn, origins)
            removed = source_state.remove_rows(conn)
            self._move_keys(conn, rearranged)
            received = source_state.request_received(conn)
            self._forget_counts(conn)
            audit_log.record(conn, AuditRecord("delete", self._actor, count=removed, detail={"start": "anew"}))
            _refuse_started(conn)
            self._binding.rebind(conn)
            for name in list(self._store.blobs.names(_BULK)):
                self._store.blobs.delete(name)
        return TransitionResult((*map(str, changes), *problems), rearranged.set_aside, removed, received)

    def _carry_database_over(self, conn: Connection, changes: Sequence[Change], rearranged: _Rearranged) -> None:
        scheme = self._binding.scheme
        for change in changes:
            if change.setting.effect is Effect.COVERAGE:
                source_state.remove_checkpoints(conn)
                source_state.remove_exports(conn)
            elif change.setting.effect is Effect.START:
                if _is_later(change):
                    source_state.raise_checkpoints(conn, scheme.start)
                else:
                    source_state.remove_checkpoints(conn)
        self._move_keys(conn, rearranged)

    def _forget_counts(self, conn: Connection) -> None:
        """Make the row counts of the partitions that are left unknown: the next load counts them."""
        partition_rows.forget_all(conn)
        for layer in ("raw", "validated"):
            for manifest in read_all_manifests(self._store, layer):
                partition_rows.record(conn, layer, manifest.resource_type, {manifest.partition_key: None})

    def _move_keys(self, conn: Connection, rearranged: _Rearranged) -> None:
        if rearranged.old_keys:
            source_state.move_received(conn, rearranged.windows, rearranged.old_keys)
        scheme = self._binding.scheme
        moved = {}
        for key in source_state.list_dead_letter_keys(conn):
            if not is_window(scheme, key) and (start := _parse_key(key)):
                moved[key] = scheme.window_at(start).key
        source_state.move_dead_letters(conn, moved)

    def _rearrange(
        self, *, strip: bool, move: bool, deletions: bool = False, dropped: frozenset[str] = frozenset()
    ) -> _Rearranged:
        """Set aside the partitions that are no longer valid, and keep their received parts.

        Partitions that are not windows of the scheme are set aside; with ``strip``, all others too. With ``move``, the
        boundaries of windows have changed, so that received parts are written again into the new windows. Received
        parts of the origins in ``dropped`` are not kept.
        """
        scheme, at = self._binding.scheme, self._now()
        foreign: list[Manifest] = []
        stripped: list[Manifest] = []
        kept: dict[tuple[str, str], Manifest] = {}
        for manifest in read_all_manifests(self._store, "raw"):
            if move or not is_window(scheme, manifest.partition_key):
                foreign.append(manifest)
            elif strip:
                stripped.append(manifest)
            else:
                kept[manifest.resource_type, manifest.partition_key] = manifest
        moved, windows = move_received(self._store, (keep_received(m, dropped) for m in foreign), scheme)
        new = {key: _merge(kept.get(key), manifest) for key, manifest in moved.items()}
        for manifest in stripped:
            if (received := keep_received(manifest, dropped)).receipts:
                key = manifest.resource_type, manifest.partition_key
                new[key] = _merge(new.get(key), received)
        old = [*foreign, *stripped]
        old += [
            manifest
            for manifest in read_all_manifests(self._store, "validated")
            if strip or move or not is_window(scheme, manifest.partition_key)
        ]
        if deletions:
            old += self._split_deletions(new, dropped)
        copy_aside(self._store, old, at)
        self._store.commit(new.values())
        for manifest in old:
            if manifest.layer == "validated" or (manifest.resource_type, manifest.partition_key) not in new:
                remove_manifest(self._store, manifest)
        keys = tuple(sorted({m.partition_key for m in foreign}))
        return _Rearranged(sum(m.layer in ("raw", "validated") for m in old), windows, keys)

    def _split_deletions(self, new: dict[tuple[str, str], Manifest], dropped: frozenset[str]) -> list[Manifest]:
        """Return the partitions of deletions. Those received through other channels are added to ``new``."""
        manifests = read_all_manifests(self._store, DELETED)
        for manifest in manifests:
            received = keep_received(manifest, dropped)
            if received.parts:
                new[manifest.resource_type, manifest.partition_key] = received
        return manifests


def _merge(base: Manifest | None, new: Manifest) -> Manifest:
    if base is None:
        return new
    return msgspec.structs.replace(base, parts=(*base.parts, *new.parts), receipts=(*base.receipts, *new.receipts))


def _is_later(change: Change) -> bool:
    if not change.setting.value:
        return False
    return not change.bound or datetime.fromisoformat(change.setting.value) > datetime.fromisoformat(change.bound)


def _parse_key(key: str) -> datetime | None:
    """Return the start of the window of a partition key of any granularity."""
    for key_format in ("%Y-%m-%d", "%Y-%m-%d-%H:%M"):
        try:
            return datetime.strptime(key, key_format).replace(tzinfo=UTC)
        except ValueError:
            continue
    return None


def _refuse_running(conn: Connection) -> None:
    runs.abandon_dead(conn)
    conn.commit()
    _refuse_started(conn)


def _refuse_started(conn: Connection) -> None:
    """Raise ConfigurationError if runs are loading. Runs that began after the first check may use the old settings."""
    if running := source_state.find_running(conn):
        raise ConfigurationError(
            f"{len(running)} runs are loading data (`fhir-assets runs list`): wait until they end, or cancel them, "
            "then run this command again"
        )
