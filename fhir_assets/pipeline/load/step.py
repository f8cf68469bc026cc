"""Loads validated partitions into tables: builds the rows of all views of a type in one pass, and commits windows."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from fhir_assets.fhir.conditional_references import list_conditions
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.deletions.deletion_log import DeletionLog
from fhir_assets.pipeline.load.result import LoadResult
from fhir_assets.pipeline.load.row_builder import (
    Batch,
    BuiltRows,
    RowBuilder,
    build_batch_of_one,
    format_column_path,
)
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.workers.gc_tuning import infrequent_gc
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.privacy.audit import Action, AuditRecord
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.storage.manifest import Arrival, Manifest, Part
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import (
    audit_log,
    checkpoints,
    dead_letter_resolution,
    dead_letters,
    held_windows,
    received,
    replays,
    runs,
)
from fhir_assets.warehouse.ops.corrections import Corrections
from fhir_assets.warehouse.ops.dead_letter_resolution import DeadLetterResolution
from fhir_assets.warehouse.ops.dead_letters import DeadLetter, Stage
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession, Session, cipher_of
from fhir_assets.warehouse.postgres.queries import identifiers
from fhir_assets.warehouse.postgres.tables import statistics, view_tables
from fhir_assets.warehouse.postgres.tables.copy_blocks import CopyBlock
from fhir_assets.warehouse.postgres.tables.loading import NO_CONSENT_GATE, LoadCounts, Loader, UnloadableResource
from fhir_assets.windows import Interval, Window, merge_intervals

TRANSACTION_ROWS = 50_000
"""Small windows share a transaction up to this many resources; a larger window has a transaction of its own."""

STAGES: tuple[Stage, ...] = ("transform", "load")
"""The stages of the dead letters that a load records."""

_ACTOR = "pipeline"

_ROWS_PER_SECOND = 8000
"""The approximate speed of one process, which determines whether worker processes are started."""


@dataclass(frozen=True, slots=True)
class _Task:
    """The parts of one window to load.

    ``from_start`` states whether ``parts`` are all parts of the window, and ``reload`` whether some of them were loaded
    before. ``until`` is the time up to which the window is fetched and validated, None if the checkpoint must not move.
    """

    window: Window
    manifest: Manifest
    parts: Sequence[Part]
    from_start: bool
    reload: bool
    until: datetime | None

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


class LoadStep:
    """Loads validated partitions into the tables of views, one resource type for each call.

    ``all_views`` states whether ``views`` are all views of the type. Only if they are, parts are recorded as loaded and
    checkpoints move. Windows with loaded resources are recorded in ``ops.held_windows`` for the destination
    ``written_to``, if one is given, in the transaction of their rows.
    """

    def __init__(
        self,
        store: Store,
        connect: OpenSession,
        views: Sequence[View],
        *,
        all_views: bool,
        run_id: str,
        refresh: Refresh,
        workers: WorkerPool,
        consent_gate: ConsentGate = NO_CONSENT_GATE,
        written_to: str = "",
    ) -> None:
        self._store = store
        self._connect = connect
        self._views = views
        self._view_names = [view.name for view in views]
        self._row_builder: RowBuilder | None = None
        self._workers = workers
        self._ruleset = compute_views_ruleset(views)
        self._all_views = all_views
        self._run_id = run_id
        self._refresh = refresh
        self._consent_gate = consent_gate
        self._written_to = written_to
        self._recorded_before = 0
        self._with_identifiers = self._finds_targets = False

    @infrequent_gc()
    def run(self, resource_type: str, windows: Sequence[Window]) -> LoadResult:
        """Load the new parts of the windows, or all parts if ``refresh`` requires it or loaded parts were replaced.

        The step first takes the record number of its dead letters and then reads the manifests. Every dead letter with
        a smaller number is therefore about a resource that the step loads, and may be resolved.

        Raises DatabaseUnavailable, ViewError, Overtaken, StoreError or WorkerLost; windows whose transaction was not
        committed are unchanged then.
        """
        total = LoadResult()
        self._recorded_before = dead_letter_resolution.next_record_number(self._connect)
        validated = self._store.manifests("validated", resource_type, [window.key for window in windows])
        with self._connect() as conn:
            view_tables.ensure_tables(conn, self._views)
            layouts = view_tables.read_layouts(conn, resource_type)
            conn.commit()
            DeletionLog(self._store, self._connect).apply_pending(conn, resource_type, run_id=self._run_id)
            for group in _group_by_transaction(self._plan_tasks(conn, resource_type, windows, validated)):
                with conn.transaction():
                    view_tables.hold_layouts(conn, resource_type, layouts)
                    self._with_identifiers = identifiers.hold_type(conn, resource_type)
                    # Under a consent policy references are resolved after the load, while decisions are locked.
                    self._finds_targets = not self._consent_gate.withholds and identifiers.are_used(conn)
                    total += self._load_group(conn, resource_type, group)
            runs.reduce_loaded(conn, self._run_id, resource_type, [window.key for window in windows])
            conn.commit()
            statistics.analyze_changed(conn, total.count_rows_by_view())
        return total

    def _plan_tasks(
        self, conn: Connection, resource_type: str, windows: Sequence[Window], validated: Sequence[Manifest]
    ) -> Iterator[_Task]:
        by_key = {window.key: window for window in windows}
        loaded = checkpoints.get_loaded_parts(conn, resource_type, list(by_key), views=self._view_names)
        conn.commit()
        keys = [manifest.partition_key for manifest in validated]
        raw_by_key = {raw.partition_key: raw for raw in self._store.manifests("raw", resource_type, keys)}
        for manifest in validated:
            raw = raw_by_key.get(manifest.partition_key)
            fetched = raw.fetched if raw else None
            loaded_names = loaded.get(manifest.partition_key, frozenset())
            new = [part for part in manifest.parts if part.name not in loaded_names]
            only_new = self._refresh is Refresh.MISSING and loaded_names.issubset(part.name for part in manifest.parts)
            yield _Task(
                by_key[manifest.partition_key],
                manifest,
                new if only_new else manifest.parts,
                not (only_new and loaded_names),
                bool(loaded_names) and not only_new,
                fetched.until if raw and fetched and manifest.covers(raw) else None,
            )

    def _load_group(self, conn: Session, resource_type: str, group: Sequence[_Task]) -> LoadResult:
        """Load the windows of one transaction, with their dead letters, counts and checkpoints."""
        keys = [task.window.key for task in group]
        resources = 0
        dead_by_rule: Counter[str] = Counter()
        dead_by_window: Counter[str] = Counter()
        loader = Loader(
            conn,
            resource_type,
            self._views,
            run_id=self._run_id,
            restore_rows=any(task.reload for task in group),
            consent_gate=self._consent_gate,
        )
        corrections = Corrections(self._connect, resource_type, STAGES, keys)
        arrived = {task.window.key: task.window.start or task.window.end for task in group}

        def record(candidates: Sequence[DeadLetter]) -> None:
            """Record dead letters. Where a person corrected the resource, load the correction instead."""
            uncorrected = []
            for dead_letter in candidates:
                corrected = corrections.find(dead_letter)
                block = self._build_block(conn, corrected, dead_letter, arrived) if corrected else None
                if corrected is None or block is None:
                    uncorrected.append(dead_letter)
                else:
                    arrivals = [Arrival(1, dead_letter.arrived)] if dead_letter.arrived else []
                    unloadable = loader.add_block(block, [corrected], dead_letter.partition_key, arrivals)
                    record([build_unloadable_dead_letter(resource_type, item) for item in unloadable])
            if uncorrected:
                loader.wait()
                with_ruleset = (replace(dead_letter, ruleset=self._ruleset) for dead_letter in uncorrected)
                dead_letters.record(conn, self._run_id, with_ruleset)
                dead_by_rule.update(dead_letter.rule for dead_letter in uncorrected)
                dead_by_window.update(dead_letter.partition_key for dead_letter in uncorrected)

        with loader:
            for _, batch, rows in self._build_rows(conn, group):
                unloadable = loader.add_block(rows.block, batch.lines, batch.partition_key, batch.arrivals)
                record([line.build_dead_letter(resource_type, batch) for line in rows.rejected])
                record([build_unloadable_dead_letter(resource_type, item) for item in unloadable])
                resources += len(batch.lines)
            counts = loader.finish()
            while late := loader.take_unloadable():
                record([build_unloadable_dead_letter(resource_type, item) for item in late])
                counts = loader.finish()
        resolved_windows = self._record_windows(conn, resource_type, group, counts, dead_by_window)
        return LoadResult(
            resources,
            counts.inserted,
            counts.updated,
            counts.superseded,
            counts.withheld.total(),
            Counter(counts.rows),
            Counter(counts.written),
            dead_by_rule,
            resolved_windows,
        )

    def _record_windows(
        self,
        conn: Session,
        resource_type: str,
        group: Sequence[_Task],
        counts: LoadCounts,
        dead_by_window: Mapping[str, int],
    ) -> frozenset[str]:
        """Resolve earlier dead letters, and record loaded parts, checkpoints, counts and the audit log.

        Return the keys of windows whose dead letters were resolved by newer versions.
        """
        keys = [task.window.key for task in group]
        complete = [task.window.key for task in group if task.from_start]
        for stage in STAGES:
            dead_letter_resolution.resolve_dead_letters(
                conn, DeadLetterResolution(self._run_id, resource_type, stage, complete, self._recorded_before)
            )
        resolved_windows = replays.resolve_superseded(conn, self._run_id, resource_type, keys)
        if self._all_views:
            self._record_loaded_parts(conn, resource_type, group)
            self._resolve_replayed(conn, resource_type, group)
        runs.record_counts(
            conn,
            self._run_id,
            resource_type,
            {
                task.window.key: {
                    "valid": task.rows - counts.withheld[task.window.key],
                    "dead": dead_by_window[task.window.key],
                    "withheld": counts.withheld[task.window.key],
                    "loaded": task.rows - dead_by_window[task.window.key] - counts.withheld[task.window.key],
                    "superseded": 0,
                }
                for task in group
            },
        )
        if self._written_to:
            loaded = [task.window.key for task in group if task.rows]
            held_windows.hold(conn, self._written_to, resource_type, loaded, run_id=self._run_id)
        audit_log.record(
            conn, *build_load_audit_records(resource_type, counts, run_id=self._run_id, detail={"windows": len(group)})
        )
        return frozenset(resolved_windows)

    def _build_rows(self, conn: Session, group: Sequence[_Task]) -> Iterator[tuple[None, Batch, BuiltRows]]:
        """Yield the rows of all batches in order. Workers build further rows while the caller writes earlier ones."""
        if not any(task.rows for task in group):
            return iter(())
        return self._workers.map(
            self._get_row_builder(conn),
            (
                (None, self._identify(conn, Batch(lines, task.window.key, _start(task), arrivals, dated)))
                for task in group
                for lines, arrivals, dated in self._store.batches_with_arrivals(task.parts)
            ),
            weigh=lambda batch: batch.size,
            seconds=sum(task.rows for task in group) / _ROWS_PER_SECOND,
        )

    def _get_row_builder(self, conn: Session) -> RowBuilder:
        self._row_builder = self._row_builder or RowBuilder(
            self._views, cipher_of(conn), conn.source, with_subjects=self._consent_gate.withholds
        )
        return self._row_builder

    def _identify(self, conn: Session, batch: Batch) -> Batch:
        """Return the batch with the loaded targets of its conditional references."""
        targets = None
        if self._finds_targets:
            hash_identifier, bases = cipher_of(conn).fingerprint, self._views[0].reference_bases
            conditions = {
                condition for line in batch.lines for condition in list_conditions(line, bases, hash_identifier)
            }
            if conditions:
                # The writing thread uses the connection of the load.
                with self._connect() as own:
                    targets = identifiers.find_targets(own, conditions)
        return batch._replace(targets=targets, with_identifiers=self._with_identifiers)

    def _build_block(
        self, conn: Session, line: bytes, dead_letter: DeadLetter, arrived: Mapping[str, datetime]
    ) -> CopyBlock | None:
        """Return the block of a corrected resource, or None if its rows cannot be built either."""
        batch = self._identify(conn, build_batch_of_one(line, dead_letter, arrived[dead_letter.partition_key]))
        rows = self._get_row_builder(conn)(batch)
        return rows.block if rows.block else None

    def _record_loaded_parts(self, conn: Connection, resource_type: str, group: Sequence[_Task]) -> None:
        """Record the parts as loaded and move the checkpoint, in the transaction of their rows."""
        checkpoints.record_loaded_parts(
            conn,
            self._run_id,
            resource_type,
            {task.window.key: task.manifest.parts for task in group},
            views=self._view_names,
        )
        inputs = {task.window.key: task.manifest.validated.inputs for task in group if task.manifest.validated}
        received.record_loaded(conn, self._run_id, resource_type, inputs)
        for span in merge_intervals(
            Interval(task.window.start, task.until) for task in group if task.until is not None
        ):
            checkpoints.advance(conn, resource_type, span.start, span.end, self._run_id)

    def _resolve_replayed(self, conn: Connection, resource_type: str, group: Sequence[_Task]) -> None:
        """Resolve the dead letters whose replays are in these windows, in the transaction of their rows."""
        replay_runs = {
            task.window.key: state.replays for task in group if (state := task.manifest.validated) and state.replays
        }
        replays.resolve_claimed(conn, self._run_id, resource_type, ["validate"], replay_runs)


def build_load_audit_records(
    resource_type: str, counts: LoadCounts, *, run_id: str, detail: dict[str, str | int | bool | None]
) -> Iterator[AuditRecord]:
    """Yield the audit records of a load: created, updated and withheld resources."""
    count_by_action: dict[Action, int] = {
        "create": counts.inserted,
        "update": counts.updated,
        "withhold": counts.withheld.total(),
    }
    for action, count in count_by_action.items():
        yield AuditRecord(action, _ACTOR, resource_type, count=count, run_id=run_id, detail=detail)


def compute_views_ruleset(views: Sequence[View]) -> str:
    """Return a hash of the definitions of views. It changes whenever the views may reject different resources."""
    text = "\0".join(sorted(f"{view.name} {view.fingerprint}" for view in views))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build_unloadable_dead_letter(resource_type: str, item: UnloadableResource) -> DeadLetter:
    """Build the dead letter of a resource that Postgres rejected."""
    return DeadLetter(
        resource_type=resource_type,
        resource_id=item.resource_id,
        stage="load",
        rule="unloadable",
        path=format_column_path(item.view, item.column),
        message=item.message,
        resource=item.body,
        partition_key=item.partition_key,
        arrived=item.arrived,
        dated=item.dated,
    )


def _start(task: _Task) -> datetime:
    return task.window.start or task.window.end


def _group_by_transaction(tasks: Iterator[_Task]) -> Iterator[list[_Task]]:
    """Group windows into transactions of at most TRANSACTION_ROWS resources, or of one larger window."""
    group: list[_Task] = []
    rows = 0
    for task in tasks:
        if group and rows + task.rows > TRANSACTION_ROWS:
            yield group
            group, rows = [], 0
        group.append(task)
        rows += task.rows
    if group:
        yield group
