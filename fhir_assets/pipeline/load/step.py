"""validated -> tables: all views of a type in one pass, whole windows a transaction."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from fhir_assets.fhir.views import View
from fhir_assets.pipeline.deletions.deletion_log import DeletionLog
from fhir_assets.pipeline.load.row_builder import Batch, BuiltRows, RowBuilder, format_column_path
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.workers.gc_tuning import infrequent_gc
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.privacy.audit import Action, AuditRecord
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.storage.manifest import Manifest, Part
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import audit_log, checkpoints, consents, dead_letters, received, replays, runs
from fhir_assets.warehouse.ops.corrections import Corrections
from fhir_assets.warehouse.ops.dead_letters import DeadLetter, Stage
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession, Session, cipher_of
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets.warehouse.postgres.tables.copy_blocks import Block
from fhir_assets.warehouse.postgres.tables.loading import OPEN, LoadCounts, Loader, Unloadable
from fhir_assets.windows import Interval, Window, joined

TRANSACTION_ROWS = 50_000
"""Small windows share a transaction until it holds this many resources; a larger window has one of its own."""

_ACTOR = "pipeline"

STAGES: tuple[Stage, ...] = ("transform", "load")
"""The stages whose dead letters a load makes."""

_ROWS_PER_SECOND = 8000
"""About how many resources one process makes rows of."""


@dataclass(slots=True)
class LoadResult:
    """What a load did, over all of its windows. ``rows`` by view; ``dead`` by rule."""

    resources: int = 0
    inserted: int = 0
    updated: int = 0
    superseded: int = 0
    withheld: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    dead_by_rule: Counter[str] = field(default_factory=Counter)
    settled_windows: set[str] = field(default_factory=set)
    """Keys of windows, of this load or not, whose dead letters newer versions settled."""


@dataclass(frozen=True, slots=True)
class _Task:
    """The parts of one window that are to be loaded; ``anew`` if they are all of it, ``again`` if it was
    loaded before.
    """

    window: Window
    manifest: Manifest
    parts: Sequence[Part]
    anew: bool
    again: bool
    until: datetime | None

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


class LoadStep:
    """Loads validated partitions of one type after the other into the tables of some of its views.

    ``whole`` says that these are all views of the type; only then is a part remembered as loaded.
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
        consent_gate: ConsentGate = OPEN,
    ) -> None:
        self._store = store
        self._connect = connect
        self._views = views
        self._make_rows: RowBuilder | None = None
        self._workers = workers
        self._ruleset = compute_views_ruleset(views)
        self._all_views = all_views
        self._run_id = run_id
        self._refresh = refresh
        self._consent_gate = consent_gate

    @infrequent_gc()
    def run(self, resource_type: str, windows: Sequence[Window], validated: Sequence[Manifest]) -> LoadResult:
        """Load what of the windows is not loaded yet, or all of it.

        Raises DatabaseUnavailable, ViewError or StoreError; windows whose transaction was not committed are as before.
        """
        total = LoadResult(rows=Counter({view.name: 0 for view in self._views}))
        with self._connect() as conn:
            view_tables.ensure_tables(conn, self._views)
            conn.commit()
            DeletionLog(self._store, self._connect).apply_pending(conn, resource_type, run_id=self._run_id)
            for group in _transactions(self._tasks(conn, resource_type, windows, validated)):
                with conn.transaction():
                    self._load_group(conn, resource_type, group, total)
        return total

    def _tasks(
        self, conn: Connection, resource_type: str, windows: Sequence[Window], validated: Sequence[Manifest]
    ) -> Iterator[_Task]:
        by_key = {window.key: window for window in windows}
        loaded = checkpoints.loaded_parts(conn, resource_type, list(by_key))
        conn.commit()
        keys = [manifest.partition_key for manifest in validated]
        sources = {each.partition_key: each for each in self._store.manifests("raw", resource_type, keys)}
        for manifest in validated:
            raw = sources.get(manifest.partition_key)
            fetched = raw.fetched if raw else None
            before = loaded.get(manifest.partition_key, frozenset())
            new = [part for part in manifest.parts if part.name not in before]
            only_new = self._refresh is Refresh.MISSING and before.issubset(part.name for part in manifest.parts)
            yield _Task(
                by_key[manifest.partition_key],
                manifest,
                new if only_new else manifest.parts,
                not (only_new and before),
                bool(before) and not only_new,
                fetched.until if raw and fetched and _covers(manifest, raw) else None,
            )

    def _load_group(self, conn: Session, resource_type: str, group: Sequence[_Task], total: LoadResult) -> None:
        """Load the windows of one transaction, with their dead letters, counts and checkpoints."""
        dead: Counter[str] = Counter()
        again = any(task.again for task in group)
        loader = Loader(conn, resource_type, self._views, run_id=self._run_id, mend=again, gate=self._consent_gate)

        corrections = Corrections(self._connect, resource_type, STAGES, [task.window.key for task in group])
        arrived = {task.window.key: task.window.start or task.window.end for task in group}

        def bury(found: Sequence[DeadLetter]) -> None:
            """Keep dead letters, of those only that nobody corrected: the corrected resource is loaded in its place."""
            letters = []
            for letter in found:
                corrected = corrections.find(letter)
                block = self._block_of(conn, corrected, letter.partition_key, arrived) if corrected else None
                if corrected is None or block is None:
                    letters.append(letter)
                else:
                    refused = loader.take(block, [corrected], letter.partition_key)
                    bury([build_unloadable_dead_letter(resource_type, item) for item in refused])
            if letters:
                loader.wait()
                dead_letters.record(conn, self._run_id, (replace(letter, ruleset=self._ruleset) for letter in letters))
                total.dead_by_rule.update(letter.rule for letter in letters)
                dead.update(letter.partition_key for letter in letters)

        with loader:
            for _, batch, rows in self._rows(conn, group):
                found = loader.take(rows.block, batch.lines, batch.partition_key)
                bury([undone.build_dead_letter(resource_type, batch) for undone in rows.rejected])
                bury([build_unloadable_dead_letter(resource_type, item) for item in found])
                total.resources += len(batch.lines)
            counts = loader.finish()
            while late := loader.late():
                bury([build_unloadable_dead_letter(resource_type, item) for item in late])
                counts = loader.finish()
        anew = [task.window.key for task in group if task.anew]
        for stage in STAGES:
            dead_letters.settle(conn, self._run_id, resource_type, stage, anew)
        keys = [task.window.key for task in group]
        total.settled_windows |= replays.supersede(conn, self._run_id, resource_type, keys)
        if self._all_views:
            self._remember(conn, resource_type, group)
            self._heal(conn, resource_type, group)
        held = consents.counts(conn, resource_type, [task.window.key for task in group])
        runs.count(
            conn,
            self._run_id,
            resource_type,
            {
                task.window.key: {
                    "loaded": task.rows - dead[task.window.key] - counts.withheld[task.window.key],
                    # As validation counted it, less what consent withholds.
                    "valid": task.manifest.rows - held[task.window.key] if task.window.key in held else None,
                    "withheld": held.get(task.window.key, 0),
                }
                for task in group
            },
        )
        audit_log.record(
            conn, *load_audit_records(resource_type, counts, run_id=self._run_id, detail={"windows": len(group)})
        )
        total.inserted += counts.inserted
        total.updated += counts.updated
        total.superseded += counts.superseded
        total.withheld += counts.withheld.total()
        total.rows.update(counts.rows)

    def _rows(self, conn: Session, group: Sequence[_Task]) -> Iterator[tuple[None, Batch, BuiltRows]]:
        """What the views make of the windows' resources, in order, while earlier ones are written."""
        if not any(task.rows for task in group):
            return iter(())
        self._make_rows = self._make_rows or RowBuilder(self._views, cipher_of(conn))
        return self._workers.map(
            self._make_rows,
            (
                (None, Batch(lines, task.window.key, task.window.start or task.window.end))
                for task in group
                for lines in self._store.batches(task.parts)
            ),
            weigh=lambda batch: batch.size,
            seconds=sum(task.rows for task in group) / _ROWS_PER_SECOND,
        )

    def _block_of(
        self, conn: Session, line: bytes, partition_key: str, arrived: Mapping[str, datetime]
    ) -> Block | None:
        """What the views make of a corrected resource; None if it is refused as well."""
        self._make_rows = self._make_rows or RowBuilder(self._views, cipher_of(conn))
        made = self._make_rows(Batch([line], partition_key, arrived[partition_key]))
        return made.block if made.block else None

    def _remember(self, conn: Connection, resource_type: str, group: Sequence[_Task]) -> None:
        """Note the parts as loaded and move the checkpoint, in the transaction of their rows."""
        checkpoints.remember_parts(
            conn, self._run_id, resource_type, {task.window.key: task.manifest.parts for task in group}
        )
        inputs = {task.window.key: task.manifest.validated.inputs for task in group if task.manifest.validated}
        received.loaded(conn, self._run_id, resource_type, inputs)
        for span in joined(Interval(task.window.start, task.until) for task in group if task.until is not None):
            checkpoints.advance(conn, resource_type, span.start, span.end, self._run_id)

    def _heal(self, conn: Connection, resource_type: str, group: Sequence[_Task]) -> None:
        """The dead letters that replays brought into these windows are resolved, in the transaction of their rows."""
        healed_by = {
            task.window.key: state.replays for task in group if (state := task.manifest.validated) and state.replays
        }
        replays.healed(conn, self._run_id, resource_type, ["validate"], healed_by)


def load_audit_records(
    resource_type: str, counts: LoadCounts, *, run_id: str, detail: dict[str, str | int | bool | None]
) -> Iterator[AuditRecord]:
    """What a load did to the tables, for the audit log."""
    done: dict[Action, int] = {
        "create": counts.inserted,
        "update": counts.updated,
        "withhold": counts.withheld.total(),
    }
    for action, count in done.items():
        yield AuditRecord(action, _ACTOR, resource_type, count=count, run_id=run_id, detail=detail)


def compute_views_ruleset(views: Sequence[View]) -> str:
    """Changes whenever other resources may be refused by ``views``: with the meaning of any of them."""
    text = "\0".join(sorted(f"{view.name} {view.fingerprint}" for view in views))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build_unloadable_dead_letter(resource_type: str, item: Unloadable) -> DeadLetter:
    """The dead letter of a resource that Postgres cannot hold."""
    return DeadLetter(
        resource_type=resource_type,
        resource_id=item.resource_id,
        stage="load",
        rule="unloadable",
        path=format_column_path(item.view, item.column),
        message=item.message,
        resource=item.body,
        partition_key=item.partition_key,
    )


def _covers(validated: Manifest, raw: Manifest) -> bool:
    """Whether all that was fetched of the window has been validated: only then may the checkpoint move on."""
    return validated.validated is not None and {part.name for part in raw.parts} == validated.validated.raw_parts


def _transactions(tasks: Iterator[_Task]) -> Iterator[list[_Task]]:
    """Whole windows in groups of about TRANSACTION_ROWS resources."""
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
