"""Fetch: read a range of windows from a source, and write each resource to the raw partition of its window."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import msgspec

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.record import Record, RejectedInput, build_record, read_header
from fhir_assets.fhir.source import Source
from fhir_assets.notices import Notice, log_notices
from fhir_assets.pipeline.dead_letter_buffer import DeadLetterBuffer, WriteDeadLetters
from fhir_assets.pipeline.fetch.plan import PlannedFetch, covering_interval, is_complete, plan_window, split_at_gaps
from fhir_assets.pipeline.fetch.undated import UndatedReader, UndatedSource, is_due
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.workers.gc_tuning import infrequent_gc
from fhir_assets.storage.manifest import Fetch, Fetched, Manifest, Part
from fhir_assets.storage.part_writer import PartWriter
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops.dead_letter_resolution import DeadLetterResolution
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.windows import LATEST, Interval, Window, WindowRange

ROUNDING = timedelta(seconds=1)
"""A source may round the start of an interval down and return resources from just before it."""

_MAX_SNAPSHOT_AGE = timedelta(days=1)
"""A snapshot that ends longer than this before the windows begin is an error. It does not mean that nothing is new."""

_Version = tuple[str, str | int | None, datetime | None]


@dataclass(slots=True)
class _Progress:
    """The counts of one planned window during the fetch, and the resource versions that its partition already has."""

    planned: PlannedFetch
    existing: Manifest | None
    stored_versions: set[_Version] = field(default_factory=set)
    matched: int = 0
    repeated: int = 0
    rejected: int = 0


@dataclass(frozen=True, slots=True)
class RawUpdate:
    """The new raw partitions of one resource type, with manifests to commit, and the counts of the fetch."""

    resource_type: str
    manifests: tuple[Manifest, ...]
    fetches: Mapping[str, Fetch]
    """By partition key, the counts of the fetch. Windows that were complete already are absent."""
    base_manifests: Mapping[str, Manifest | None] = field(default_factory=dict)
    """By partition key, the manifest that the fetch found, which it extends or replaces; None for a new partition (see
    pipeline.partition_commit).
    """
    before_first_window: int = 0
    """How many resources were skipped because they are older than FHIR_LAST_UPDATED_GTE."""
    refusal: str = ""
    """Why the source refuses this resource type; empty if it does not, or if it refuses all types (an error)."""
    resolution: DeadLetterResolution | None = None
    """The dead letters that the commit of the manifests resolves: those of windows that were read from their start."""

    @property
    def refetched_keys(self) -> tuple[str, ...]:
        """The keys of the windows that were read from their start."""
        return tuple(self.resolution.partition_keys) if self.resolution else ()

    @property
    def notices(self) -> tuple[Notice, ...]:
        """The notices of all fetches, without duplicates."""
        return tuple(dict.fromkeys(notice for fetch in self.fetches.values() for notice in fetch.notices))

    def add_notices(self, notices: Sequence[Notice]) -> "RawUpdate":
        """Return a copy in which each window also has those of the notices that concern its resource type."""
        own = tuple(notice for notice in notices if notice.resource_type in (None, self.resource_type))
        if not own:
            return self
        fetches = {
            key: msgspec.structs.replace(fetch, notices=(*fetch.notices, *own)) for key, fetch in self.fetches.items()
        }
        return replace(
            self,
            manifests=tuple(_replace_last_fetch(manifest, fetches) for manifest in self.manifests),
            fetches=fetches,
        )


class FetchStep:
    """Fetches windows from a source into the raw layer of a store.

    ``now`` is the end of the open window. An extension starts ``overlap`` before the end of the last fetch.
    ``write_dead_letters`` records the entries that are not resources. The commit resolves only dead letters whose
    number is smaller than ``recorded_before`` (see ``warehouse.ops.dead_letter_resolution``), with 0 none.
    """

    def __init__(
        self,
        source: Source,
        store: Store,
        *,
        run_id: str,
        now: datetime,
        overlap: timedelta,
        refresh: Refresh,
        write_dead_letters: WriteDeadLetters,
        recorded_before: int = 0,
    ) -> None:
        self._source = source
        self._store = store
        self._run_id = run_id
        self._started = self._now = now
        self._complete_until: dict[str, datetime] = {}
        self._overlap = overlap
        self._refresh = refresh
        self._dead_letters = DeadLetterBuffer(write_dead_letters)
        self._recorded_before = recorded_before

    @infrequent_gc()
    def run(self, resource_types: Sequence[str], windows: WindowRange) -> list[RawUpdate]:
        """Fetch the missing intervals of the windows and write them as parts. The caller commits the manifests.

        Raises ServerUnavailable, ServerRefused, NotFhir or StoreError; the partitions are unchanged then. NotFhir is
        also raised for a snapshot that ends long before the windows begin, which would leave all of them empty.
        """
        state = self._source.compute_state()
        plans = {name: self._plan(name, windows, state) for name in resource_types}
        planned = {name: covering_interval(p.planned for p in plan.values()) for name, plan in plans.items() if plan}
        for name, until in (self._source.complete_until(planned) if planned else {}).items():
            if until < self._now or self._source.one_pass:
                # The source is complete up to `until` only: a later run fetches the rest of the interval. A snapshot
                # that was requested just now ends shortly after `now`, and is read to its end.
                self._complete_until[name] = until
                plans[name] = self._plan(name, windows, state)
                if not plans[name]:
                    _raise_if_long_before(until, planned[name])
        for name in self._source.refused if planned else ():
            plans[name] = {}
        before_first_window = dict.fromkeys(resource_types, 0)
        fetches: dict[str, dict[str, Fetch]] = {name: {} for name in resource_types}
        notices: list[Notice] = []
        with PartWriter(self._store, "raw") as writer:
            for request in self._plan_requests(plans, windows):
                for item in self._source.fetch(request.names, request.interval):
                    self._store_item(item, windows, plans, before_first_window, writer)
                for name in request.names:
                    requested = request.windows or list(plans[name].values())
                    fetches[name] |= self._count_fetches(name, requested, request.total)
                    fetches[name] |= self._fetch_undated(name, windows, plans[name], fetches[name], writer)
                notices += self._source.drain_notices()
                for name in request.names if notices else ():
                    noted = [p.planned.window.key for p in request.windows or plans[name].values()]
                    fetches[name] |= _add_notices(name, {key: fetches[name][key] for key in noted}, notices)
                notices = [notice for notice in notices if notice.resource_type not in (None, *request.names)]
            log_notices([*notices, *self._source.drain_notices()])
            self._dead_letters.flush()
            parts = writer.finish()
        return [
            RawUpdate(
                name,
                tuple(
                    self._build_manifest(progress.planned, name, parts.get((name, key), ()), fetches[name][key], state)
                    for key, progress in plan.items()
                ),
                fetches[name],
                {key: progress.existing for key, progress in plan.items()},
                before_first_window[name],
                refusal=str(self._source.refused.get(name, "")) if planned else "",
                resolution=self._build_resolution(name, plan),
            )
            for name, plan in plans.items()
        ]

    def _build_resolution(self, name: str, plan: Mapping[str, _Progress]) -> DeadLetterResolution:
        refetched = [key for key, progress in plan.items() if progress.planned.base is None]
        return DeadLetterResolution(self._run_id, name, "fetch", refetched, self._recorded_before)

    def _fetch_undated(
        self,
        name: str,
        windows: WindowRange,
        plan: Mapping[str, _Progress],
        fetches: Mapping[str, Fetch],
        writer: PartWriter,
    ) -> dict[str, Fetch]:
        """Read the resources without ``lastUpdated`` into the current window, and return its fetch with their counts.

        Return nothing if the current window is not in the range, or was read for such resources recently.
        """
        window = windows.find(self._started)
        progress = plan.get(window.key) if window else None
        source = self._source
        if window is None or progress is None or window.key not in fetches or not isinstance(source, UndatedSource):
            return {}
        base = progress.planned.base
        if fetches[window.key].undated is not None or not is_due(base, self._started):
            return {}
        reader = UndatedReader(source, name)
        repeated = rejected = 0
        known: set[_Version] | None = None
        for item in reader.read():
            if known is None:
                known = {key for key in self._read_versions(base.parts if base else ()) if key[2] is None}
            if isinstance(item, RejectedInput):
                rejected += 1
                self._dead_letters.add(_build_dead_letter(item, window.key))
            elif item.version_key in known:
                repeated += 1
            else:
                known.add(item.version_key)
                writer.add(name, window.key, item.body, None, arrived=self._started, dated=item.dated)
        undated = reader.build_result(self._started, repeated=repeated, rejected=rejected)
        return {window.key: msgspec.structs.replace(fetches[window.key], undated=undated)}

    def _plan_requests(
        self, plans: Mapping[str, Mapping[str, _Progress]], windows: WindowRange
    ) -> Iterator["_Request"]:
        """Yield one request for all types if the source is read in one pass. Otherwise yield one for each type and
        sequence of adjacent windows.
        """
        if self._source.one_pass:
            names = [name for name, plan in plans.items() if plan]
            if names:
                interval = covering_interval(p.planned for name in names for p in plans[name].values())
                if windows.from_first:
                    # Resources that are older than all windows belong to the first window.
                    interval = Interval(None, interval.end)
                if windows.interval.end > self._started:
                    # Resources with a lastUpdated in the future (of a clock that is ahead) belong to the last window.
                    interval = Interval(interval.start, LATEST)
                yield _Request(names, interval, None, None)
            return
        for name, plan in plans.items():
            for sequence in split_at_gaps(progress.planned for progress in plan.values()):
                interval = covering_interval(sequence)
                total = self._source.count(name, interval)
                yield _Request([name], interval, [plan[p.window.key] for p in sequence], total)

    def _plan(self, name: str, windows: WindowRange, state: str | None) -> dict[str, _Progress]:
        plan = {}
        keys = [window.key for window in windows.windows]
        existing = {manifest.partition_key: manifest for manifest in self._store.manifests("raw", name, keys)}
        for window in windows.windows:
            planned = plan_window(
                window,
                existing.get(window.key),
                now=self._complete_until.get(name, self._now),
                overlap=self._overlap,
                refresh=self._refresh,
                source_state=state,
            )
            if planned:
                plan[window.key] = _Progress(planned, existing.get(window.key), self._read_stored_versions(planned))
        return plan

    def _read_stored_versions(self, planned: PlannedFetch) -> set[_Version]:
        """Return the stored resource versions in the overlap, which the source returns again."""
        if planned.base is None or planned.interval.start is None:
            return set()
        since = planned.interval.start - ROUNDING
        fetched = (part for part in planned.base.parts if part.origin is None)
        overlapping = [part for part in fetched if part.last is None or part.last >= since]
        return self._read_versions(overlapping)

    def _read_versions(self, parts: Iterable[Part]) -> set[_Version]:
        versions = set()
        for batch in self._store.batches(parts):
            for line in batch:
                versions.add(build_record(line, read_header(line), self._now).version_key)
        return versions

    def _store_item(
        self,
        item: Record | RejectedInput,
        windows: WindowRange,
        plans: Mapping[str, Mapping[str, _Progress]],
        before_first_window: dict[str, int],
        writer: PartWriter,
    ) -> None:
        window = _find_window(windows, item)
        if window is None:
            before_first_window[item.resource_type] += 1
            return
        plan = plans[item.resource_type]
        progress = plan.get(window.key)
        if progress is None and isinstance(item, Record) and item.late:
            progress = next(reversed(list(plan.values())), None)
        if progress is None:
            return
        progress.matched += 1
        if isinstance(item, RejectedInput):
            progress.rejected += 1
            self._dead_letters.add(_build_dead_letter(item, window.key))
            return
        if progress.stored_versions and item.version_key in progress.stored_versions:
            progress.repeated += 1
            return
        # All answers of a server to one fetch have the same time of arrival; each file has its own.
        arrived = item.arrived if self._source.one_pass else self._started
        key = progress.planned.window.key
        writer.add(item.resource_type, key, item.body, item.last_updated, arrived=arrived, dated=item.dated)

    def _count_fetches(self, name: str, windows: list[_Progress], total_before: int | None) -> dict[str, Fetch]:
        """Return the counts of each window by partition key, with the source's total if the source can count.

        ``total_before`` is the source's total of all windows before the fetch. If it equals the number of fetched
        resources, the source does not have to count each window. A resource that is updated during the fetch leaves
        its window; therefore any number between the totals before and after the fetch is accepted as well.
        """
        matched = sum(progress.matched for progress in windows)
        matches = total_before == matched
        if total_before is not None and not matches:
            total_after = self._source.count(name, covering_interval(progress.planned for progress in windows))
            matches = total_after is not None and (
                min(total_before, total_after) <= matched <= max(total_before, total_after)
            )
        fetches = {}
        for progress in windows:
            planned = progress.planned
            if total_before is None:
                total = None
            elif matches:
                total = progress.matched
            else:
                total = self._source.count(name, planned.interval)
            fetches[planned.window.key] = Fetch(
                planned.interval.start,
                planned.interval.end,
                self._now,
                total,
                progress.matched,
                progress.repeated,
                progress.rejected,
            )
        return fetches

    def _build_manifest(
        self, planned: PlannedFetch, name: str, parts: tuple[Part, ...], fetch: Fetch, state: str | None
    ) -> Manifest:
        base = planned.base
        earlier = base.fetched.fetches if base and base.fetched else ()
        complete = is_complete(planned.window, now=self._complete_until.get(name, self._now), overlap=self._overlap)
        return Manifest(
            "raw",
            name,
            planned.window.key,
            self._run_id,
            self._now,
            (base.parts if base else ()) + parts,
            fetched=Fetched(planned.interval.end, complete, (*earlier, fetch), state),
            receipts=base.receipts if base else (),
        )


@dataclass(frozen=True, slots=True)
class _Request:
    """One query of the source. ``windows`` and the source's ``total`` are None for a query of several types."""

    names: list[str]
    interval: Interval
    windows: list[_Progress] | None
    total: int | None


def _replace_last_fetch(manifest: Manifest, fetches: Mapping[str, Fetch]) -> Manifest:
    """Return the manifest of a raw partition whose last fetch is that of ``fetches``."""
    if manifest.fetched is None or manifest.partition_key not in fetches:
        return manifest
    earlier = manifest.fetched.fetches[:-1]
    fetched = msgspec.structs.replace(manifest.fetched, fetches=(*earlier, fetches[manifest.partition_key]))
    return msgspec.structs.replace(manifest, fetched=fetched)


def _raise_if_long_before(until: datetime, interval: Interval) -> None:
    """Raise NotFhir if a snapshot ends so long before the interval begins that its time must be wrong."""
    if interval.start is not None and until < interval.start - _MAX_SNAPSHOT_AGE:
        raise NotFhir(
            f"the source is complete up to {until:%Y-%m-%d %H:%M} only (the transactionTime of its export, or the time "
            f"of its clock), but the windows begin at {interval.start:%Y-%m-%d %H:%M}, so that none of its resources "
            "would be loaded: correct the clock of the server, then run again"
        )


def _add_notices(name: str, fetches: Mapping[str, Fetch], notices: Sequence[Notice]) -> dict[str, Fetch]:
    """Return the fetches with the notices that concern the resource type."""
    own = tuple(notice for notice in notices if notice.resource_type in (None, name))
    return {key: msgspec.structs.replace(fetch, notices=own) for key, fetch in fetches.items()}


def _find_window(windows: WindowRange, item: Record | RejectedInput) -> Window | None:
    """Return the window to which an item of the source belongs; None if it is older than all windows of the range."""
    if isinstance(item, RejectedInput) or item.last_updated is None or item.late:
        return windows.nearest(item.arrived)
    start = windows.interval.start
    return windows.nearest(item.last_updated) if start is None or item.last_updated >= start else None


def _build_dead_letter(item: RejectedInput, partition_key: str) -> DeadLetter:
    return DeadLetter(
        resource_type=item.resource_type,
        resource_id=item.resource_id,
        stage="fetch",
        rule=item.rule,
        path=item.path,
        message=item.message,
        resource=item.body,
        partition_key=partition_key,
    )
