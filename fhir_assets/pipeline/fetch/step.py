"""Source -> raw: a range of windows read in one pass, split into its partitions as it streams."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from fhir_assets.fhir.record import Record, RejectedInput, parse_instant, read_header
from fhir_assets.fhir.source import Source
from fhir_assets.pipeline.dead_letter_buffer import DeadLetterBuffer, WriteDeadLetters
from fhir_assets.pipeline.fetch.plan import Planned, covering_interval, is_complete, plan_window, split_at_gaps
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.workers.gc_tuning import infrequent_gc
from fhir_assets.storage.manifest import Fetch, Fetched, Manifest, Part
from fhir_assets.storage.part_writer import PartWriter
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.windows import Interval, WindowRange

_ROUNDING = timedelta(seconds=1)
"""A source may round the start of an interval down, and give what lies just before it."""

_Version = tuple[str, str | None, datetime | None]


@dataclass(slots=True)
class _Progress:
    """What came of one planned window so far."""

    planned: Planned
    seen: set[_Version] = field(default_factory=set)
    matched: int = 0
    repeated: int = 0
    rejected: int = 0


@dataclass(frozen=True, slots=True)
class RawUpdate:
    """The new partitions of one type, not yet visible, and what the fetch found out about each."""

    resource_type: str
    manifests: tuple[Manifest, ...]
    fetches: Mapping[str, Fetch]
    """By partition key; a window that needed nothing has none."""
    refetched_keys: tuple[str, ...] = ()
    """The keys of the windows that were read from their start, so that earlier dead letters can be settled."""
    bases: Mapping[str, Manifest | None] = field(default_factory=dict)
    """By partition key, what each manifest was made from: see pipeline.partition_commit."""
    before_first_window: int = 0
    """Resources older than the first window, left out as FHIR_LAST_UPDATED_GTE asks."""


class FetchStep:
    """Fetches windows from a source into the raw layer of a store."""

    def __init__(
        self,
        source: Source,
        store: Store,
        *,
        run_id: str,
        now: datetime,
        overlap: timedelta,
        refresh: Refresh,
        reject: WriteDeadLetters,
    ) -> None:
        self._source = source
        self._store = store
        self._run_id = run_id
        self._now = now
        self._overlap = overlap
        self._refresh = refresh
        self._letters = DeadLetterBuffer(reject)

    @infrequent_gc()
    def run(self, resource_types: Sequence[str], windows: WindowRange) -> list[RawUpdate]:
        """Read what the windows lack and write it as parts; the caller commits the manifests.

        Raises ServerUnavailable, ServerRefused, NotFhir or StoreError; the partitions are then as before.
        """
        state = self._source.state()
        plans = {name: self._plan(name, windows, state) for name in resource_types}
        planned = [progress.planned for plan in plans.values() for progress in plan.values()]
        until = self._source.until(resource_types, covering_interval(planned)) if planned else None
        if until is not None and until < self._now:
            # What the source cannot know of yet is not fetched, and stays due.
            self._now = until
            plans = {name: self._plan(name, windows, state) for name in resource_types}
        outside = dict.fromkeys(resource_types, 0)
        fetches: dict[str, dict[str, Fetch]] = {name: {} for name in resource_types}
        with PartWriter(self._store, "raw") as writer:
            for request in self._requests(plans, windows):
                for item in self._source.fetch(request.names, request.interval):
                    self._place(item, windows, plans, outside, writer)
                for name in request.names:
                    stretch = request.stretch or list(plans[name].values())
                    fetches[name] |= self._settle(name, stretch, request.total)
            self._letters.flush()
            parts = writer.finish()
        return [
            RawUpdate(
                name,
                tuple(
                    self._manifest(progress.planned, name, parts.get((name, key), ()), fetches[name][key], state)
                    for key, progress in plan.items()
                ),
                fetches[name],
                tuple(key for key, progress in plan.items() if progress.planned.base is None),
                {key: progress.planned.base for key, progress in plan.items()},
                outside[name],
            )
            for name, plan in plans.items()
        ]

    def _requests(self, plans: Mapping[str, Mapping[str, _Progress]], windows: WindowRange) -> Iterator["_Request"]:
        """What to ask the source for: everything at once, or a type and an unbroken stretch at a time."""
        if self._source.one_pass:
            wanted = [name for name, plan in plans.items() if plan]
            if wanted:
                whole = covering_interval(p.planned for name in wanted for p in plans[name].values())
                if windows.from_first:
                    # What bears no lastUpdated and is older than all windows belongs into the first.
                    whole = Interval(None, whole.end)
                yield _Request(wanted, whole, None, None)
            return
        for name, plan in plans.items():
            for run in split_at_gaps(progress.planned for progress in plan.values()):
                interval = covering_interval(run)
                total = self._source.count(name, interval)
                yield _Request([name], interval, [plan[p.window.key] for p in run], total)

    def _plan(self, name: str, windows: WindowRange, state: str | None) -> dict[str, _Progress]:
        plan = {}
        keys = [window.key for window in windows.windows]
        existing = {each.partition_key: each for each in self._store.manifests("raw", name, keys)}
        for window in windows.windows:
            planned = plan_window(
                window,
                existing.get(window.key),
                now=self._now,
                overlap=self._overlap,
                refresh=self._refresh,
                source_state=state,
            )
            if planned:
                plan[window.key] = _Progress(planned, self._seen(planned))
        return plan

    def _seen(self, planned: Planned) -> set[_Version]:
        """The versions that the partition has already from the overlap, which the source will give again."""
        if planned.base is None or planned.interval.start is None:
            return set()
        since = planned.interval.start - _ROUNDING
        fetched = (part for part in planned.base.parts if part.origin is None)
        again = [part for part in fetched if part.last is None or part.last >= since]
        seen = set()
        for batch in self._store.batches(again):
            for line in batch:
                header = read_header(line)
                meta = header.meta
                moment = parse_instant(meta.lastUpdated) if meta else None
                seen.add((header.id or "", meta.versionId if meta else None, moment))
        return seen

    def _place(
        self,
        item: Record | RejectedInput,
        windows: WindowRange,
        plans: Mapping[str, Mapping[str, _Progress]],
        outside: dict[str, int],
        writer: PartWriter,
    ) -> None:
        moment = item.last_updated if isinstance(item, Record) else None
        window = windows.nearest(item.arrived) if moment is None else windows.place(moment)
        if window is None:
            outside[item.resource_type] += 1
            return
        progress = plans[item.resource_type].get(window.key)
        if progress is None:
            return
        progress.matched += 1
        if isinstance(item, RejectedInput):
            progress.rejected += 1
            self._letters.add(_letter(item, window.key))
            return
        if progress.seen and (item.id, item.version_id, item.last_updated) in progress.seen:
            progress.repeated += 1
            return
        writer.add(item.resource_type, window.key, item.body, moment)

    def _settle(self, name: str, stretch: list[_Progress], before: int | None) -> dict[str, Fetch]:
        """Compare what came with what the source says it has: for the stretch, and where that differs by window.

        A resource that is updated meanwhile leaves its window, so a number between the totals before and
        after the reading is right too.
        """
        matched = sum(progress.matched for progress in stretch)
        agreed = before == matched
        if before is not None and not agreed:
            after = self._source.count(name, covering_interval(progress.planned for progress in stretch))
            agreed = after is not None and min(before, after) <= matched <= max(before, after)
        fetches = {}
        for progress in stretch:
            planned = progress.planned
            if before is None:
                total = None
            elif agreed:
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

    def _manifest(
        self, planned: Planned, name: str, parts: tuple[Part, ...], fetch: Fetch, state: str | None
    ) -> Manifest:
        base = planned.base
        earlier = base.fetched.fetches if base and base.fetched else ()
        complete = is_complete(planned.window, now=self._now, overlap=self._overlap)
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
    """One asking of the source; ``stretch`` and ``total`` where it is for one type."""

    names: list[str]
    interval: Interval
    stretch: list[_Progress] | None
    total: int | None


def _letter(item: RejectedInput, partition_key: str) -> DeadLetter:
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
