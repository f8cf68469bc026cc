"""Extends windows to which the source has added nothing, so that no run has to load them.

A run writes a dozen events for each asset. Most ticks of the schedule find nothing new: this step sends the source the
same requests as a fetch, and moves the checkpoint if the answers contain only what the store has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from time import monotonic

import msgspec

from fhir_assets.errors import NotFhir, ServerRefused, ServerUnavailable
from fhir_assets.fhir.record import RejectedInput, build_record, read_header
from fhir_assets.fhir.search.history import DeletionHistory
from fhir_assets.fhir.source import Source
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.fetch.plan import PlannedFetch, covering_interval, is_complete, plan_window, split_at_gaps
from fhir_assets.pipeline.fetch.step import ROUNDING, RawUpdate
from fhir_assets.pipeline.fetch.undated import UndatedSource, is_due
from fhir_assets.pipeline.partition_commit import commit_update
from fhir_assets.pipeline.reconcile.window_counts import find_main_view, reconcile
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.storage.manifest import Fetch, Manifest
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import checkpoints, held_windows, received, run_history
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession
from fhir_assets.warehouse.postgres.tables import deletions
from fhir_assets.windows import Interval, Window, WindowRange, merge_intervals

_ACTOR = "extension"
"""The run id of checkpoints that an extension moved."""

_MAX_DELETIONS = 1000
"""A type with this many deletions since its checkpoint needs a run, even if all of them are applied."""


@dataclass(frozen=True, slots=True)
class LayerRules:
    """The conditions under which the layers of a window are complete.

    ``rules_version`` is that of the validator, and ``views`` are all views. ``delivery_url`` is the server to which
    loaded windows are delivered, and ``export_url`` the place that runs are exported to; empty if there is none.
    """

    rules_version: str
    views: Sequence[View]
    delivery_url: str = ""
    export_url: str = ""


class ExtendStep:
    """Extends the windows of resource types that need no run. ``now`` is the end of the open window.

    ``history`` is the reader of the source's deletions; None if deletions are not read. With ``verified``, windows that
    do not reconcile with the tables need a run too, which takes time that grows with the windows.
    """

    def __init__(
        self,
        source: Source,
        store: Store,
        connect: OpenSession,
        rules: LayerRules,
        *,
        now: datetime,
        overlap: timedelta,
        history: DeletionHistory | None = None,
        verified: bool = False,
    ) -> None:
        self._source = source
        self._store = store
        self._connect = connect
        self._rules = rules
        self._now = now
        self._overlap = overlap
        self._history = history
        self._verified = verified

    def run(self, resource_types: Sequence[str], windows: WindowRange, *, seconds: float) -> list[str]:
        """Extend the windows of the types to which the source has added nothing. Return the other types, in order.

        A run has to load a type if the source has new resources or gives no clear answer, if one of its windows ends,
        if a layer is not complete, if resources are waiting to be loaded, or if the last run failed. Types are not
        examined once ``seconds`` have passed or the source is unavailable. Types that the source does not offer are
        returned when the first of the windows has ended. Raises ServerUnavailable if the source does not say which
        types it offers, DatabaseUnavailable, and StoreError.
        """
        deadline = monotonic() + seconds
        offered = self._source.list_types()
        self._source.drain_notices()
        ended = is_complete(windows.windows[0], now=self._now, overlap=self._overlap)
        available = True
        types = []
        for name in resource_types:
            if offered is not None and name not in offered:
                if ended:
                    types.append(name)
                continue
            try:
                extended = available and monotonic() < deadline and self._extend(name, windows)
            except (ServerRefused, NotFhir):
                extended = False
            except ServerUnavailable:
                extended = available = False
            if not extended:
                types.append(name)
        return types

    def _extend(self, name: str, windows: WindowRange) -> bool:
        """Extend the windows of a type if they need no run. Return whether they were extended."""
        now = min(self._now, self._source.complete_until({name: windows.interval}).get(name, self._now))
        begun = [window for window in windows.windows if window.start is None or window.start < now]
        keys = [window.key for window in begun]
        raw = {manifest.partition_key: manifest for manifest in self._store.manifests("raw", name, keys)}
        if len(raw) < len(keys) or not self._is_loaded(name, raw):
            return False
        planned = [
            plan
            for window in begun
            if (
                plan := plan_window(
                    window,
                    raw[window.key],
                    now=now,
                    overlap=self._overlap,
                    refresh=Refresh.MISSING,
                    source_state=None,
                )
            )
        ]
        if any(p.base is None or is_complete(p.window, now=now, overlap=self._overlap) for p in planned):
            return False
        if self._is_undated_due(planned):
            return False
        fetches: dict[str, Fetch] = {}
        for sequence in split_at_gaps(planned):
            found = self._fetch(name, windows, sequence)
            if found is None:
                return False
            fetches |= found
        if not self._confirm_deletions_applied(name):
            return False
        if not self._commit(name, begun, raw, planned, fetches):
            return False
        return not self._verified or self._reconciles(name, keys)

    def _is_loaded(self, name: str, raw: Mapping[str, Manifest]) -> bool:
        """Return whether everything in these raw partitions is validated, loaded, delivered and exported, and nothing
        is pending.
        """
        keys = list(raw)
        validated = self._store.manifests("validated", name, keys)
        if len(validated) < len(raw):
            return False
        for manifest in validated:
            state = manifest.validated
            if state is None or state.rules_version != self._rules.rules_version:
                return False
            if not manifest.covers(raw[manifest.partition_key]):
                return False
        views = [view.name for view in self._rules.views if view.resource_type == name]
        deleted = self._store.manifest("deleted", name, "all")
        with self._connect() as conn:
            loaded = checkpoints.get_loaded_parts(conn, name, keys, views=views)
            return (
                all(
                    {part.name for part in manifest.parts} == loaded.get(manifest.partition_key, frozenset())
                    for manifest in validated
                )
                and not received.find_pending_windows(conn, name, keys)
                and not run_history.has_unsuccessful_window(conn, name, keys)
                and not (deleted and deletions.find_unapplied_parts(conn, [part.name for part in deleted.parts]))
                and self._is_delivered(conn, name, validated)
                and self._is_exported(conn, name)
            )

    def _reconciles(self, name: str, partition_keys: Sequence[str]) -> bool:
        main_view = find_main_view(self._rules.views, name)
        with self._connect() as conn:
            counts = reconcile(conn, self._store, name, partition_keys, main_view=main_view)
            return not any(window.faults for window in counts)

    def _is_delivered(self, conn: Connection, name: str, validated: Sequence[Manifest]) -> bool:
        """Return whether no delivery of a type is pending: neither parts of these windows, nor windows that are
        held back.
        """
        if not self._rules.delivery_url:
            return True
        if any(held == name and target.startswith("delivered ") for target, held, _ in held_windows.list_held(conn)):
            return False
        for manifest in validated:
            delivery = self._store.manifest("delivered", manifest.resource_type, manifest.partition_key)
            state = delivery.delivered if delivery else None
            if any(part.name not in (state.inputs if state else ()) for part in manifest.parts):
                return False
            if state and state.destination.rstrip("/") != self._rules.delivery_url.rstrip("/"):
                return False
        return True

    def _is_exported(self, conn: Connection, name: str) -> bool:
        """Return whether no window of a type waits for the export of a run."""
        if not self._rules.export_url:
            return True
        return not held_windows.find_held(conn, held_windows.name_export_destination(self._rules.export_url), name)

    def _is_undated_due(self, planned: Sequence[PlannedFetch]) -> bool:
        """Return whether the current window has to be read for resources without ``lastUpdated``."""
        return isinstance(self._source, UndatedSource) and any(
            is_due(plan.base, self._now) for plan in planned if plan.window.end > self._now
        )

    def _fetch(self, name: str, windows: WindowRange, sequence: Sequence[PlannedFetch]) -> dict[str, Fetch] | None:
        """Return the fetches of adjacent intervals by partition key, or None if the intervals need a run."""
        interval = covering_interval(sequence)
        known = {plan.window.key: self._read_versions(plan) for plan in sequence}
        repeated = dict.fromkeys(known, 0)
        total = self._source.count(name, interval)
        for item in self._source.fetch([name], interval):
            window = None if isinstance(item, RejectedInput) else windows.find(item.last_updated or item.arrived)
            if window is None or isinstance(item, RejectedInput) or item.late:
                return None
            if item.version_key not in known.get(window.key, ()):
                return None
            repeated[window.key] += 1
        notices = tuple(n for n in self._source.drain_notices() if n.resource_type in (None, name))
        fetched = [plan.base.fetched for plan in sequence if plan.base and plan.base.fetched]
        if any(notice not in state.notices for state in fetched for notice in notices):
            return None
        if total is not None and total != sum(repeated.values()):
            return None
        return {
            plan.window.key: Fetch(
                plan.interval.start,
                plan.interval.end,
                self._now,
                None if total is None else repeated[plan.window.key],
                repeated[plan.window.key],
                repeated[plan.window.key],
                0,
                notices,
            )
            for plan in sequence
        }

    def _read_versions(self, plan: PlannedFetch) -> set[object]:
        """Return the versions in the overlap of a window that the store already has."""
        if plan.base is None or plan.interval.start is None:
            return set()
        since = plan.interval.start - ROUNDING
        parts = [part for part in plan.base.parts if part.origin is None and (part.last is None or part.last >= since)]
        return {
            build_record(line, read_header(line), self._now).version_key
            for batch in self._store.batches(parts)
            for line in batch
        }

    def _confirm_deletions_applied(self, name: str) -> bool:
        """Return whether all deletions in the source's history are applied, and move the checkpoint of deletions if so.

        The history is read from a time before the checkpoint, and therefore contains deletions that are already
        applied.
        """
        history = self._history
        if history is None:
            return True
        offered = history.list_types()
        if offered is not None and name not in offered:
            return True
        with self._connect() as conn:
            start = deletions.read_checkpoint(conn, name)
        if start is None:
            return False
        found = list(islice(history.fetch_since(name, start - self._overlap), _MAX_DELETIONS))
        if len(found) == _MAX_DELETIONS:
            return False
        with self._connect() as conn:
            if not deletions.are_applied(conn, found):
                return False
        if history.drain_notices():
            return False
        with self._connect() as conn, conn.transaction():
            deletions.advance_checkpoint(conn, name, min(self._now, history.requested_at or self._now), _ACTOR)
        return True

    def _commit(
        self,
        name: str,
        windows: Sequence[Window],
        raw: Mapping[str, Manifest],
        planned: Sequence[PlannedFetch],
        fetches: Mapping[str, Fetch],
    ) -> bool:
        """Commit the extended partitions and move the checkpoint.

        Return False, and leave the checkpoint, if another process has added parts to a partition in the meantime.
        """
        extended = {plan.window.key: _extend_manifest(plan, fetches[plan.window.key], self._now) for plan in planned}
        update = RawUpdate(name, tuple(extended.values()), fetches, {plan.window.key: plan.base for plan in planned})
        committed = commit_update(self._connect, self._store, update)
        if any(manifest.parts != raw[manifest.partition_key].parts for manifest in committed):
            return False
        current = {**raw, **extended}
        fetched = [(window, current[window.key].fetched) for window in windows]
        with self._connect() as conn:
            for span in merge_intervals(Interval(window.start, state.until) for window, state in fetched if state):
                checkpoints.advance(conn, name, span.start, span.end, _ACTOR)
        return True


def _extend_manifest(plan: PlannedFetch, fetch: Fetch, now: datetime) -> Manifest:
    """Return the manifest of an open window after a fetch that returned nothing new.

    It keeps the run id of its parts.
    """
    base = plan.base
    assert base is not None
    assert base.fetched is not None
    fetched = msgspec.structs.replace(
        base.fetched, until=plan.interval.end, complete=False, fetches=(*base.fetched.fetches, fetch)
    )
    return msgspec.structs.replace(base, written_at=now, fetched=fetched)
