"""Replays dead letters of the stages ``transform`` and ``load``: loads their stored resources again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from fhir_assets.fhir.views import View
from fhir_assets.pipeline.load.row_builder import RowBuilder, build_batch_of_one, format_column_path
from fhir_assets.pipeline.load.step import STAGES as LOAD_STAGES
from fhir_assets.pipeline.load.step import build_load_audit_records, compute_views_ruleset
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.warehouse.ops import audit_log, held_windows, replays
from fhir_assets.warehouse.ops.replays import ClaimedDeadLetter, FailedReplay
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session, cipher_of
from fhir_assets.warehouse.postgres.queries import identifiers
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets.warehouse.postgres.tables.loading import NO_CONSENT_GATE, Loader
from fhir_assets.windows import Window


@dataclass(frozen=True, slots=True)
class ReplayLoadResult:
    """The number of dead letters that were resolved, and of those that failed again and stay open."""

    resolved: int = 0
    failed: int = 0


class ReplayLoadStep:
    """Loads the dead letters of stages ``transform`` and ``load`` that a run claims into all tables of their type.

    With ``also_open`` the run claims all open dead letters, not only those that were marked for a replay.
    ``written_to`` is an argument of ``LoadStep``.
    """

    def __init__(
        self,
        connect: OpenSession,
        views: Sequence[View],
        *,
        run_id: str,
        also_open: bool,
        consent_gate: ConsentGate = NO_CONSENT_GATE,
        written_to: str = "",
    ) -> None:
        self._connect = connect
        self._views = views
        self._consent_gate = consent_gate
        self._run_id = run_id
        self._also_open = also_open
        self._written_to = written_to

    def run(self, resource_type: str, windows: Sequence[Window]) -> ReplayLoadResult:
        """Load the claimed dead letters of the windows, a few hundred in each transaction.

        Raises DatabaseUnavailable, ViewError or EncryptionError; committed transactions stay.
        """
        arrived = {window.key: window.start or window.end for window in windows}
        with self._connect() as conn:
            committed_runs: dict[str, list[str]] = {key: [] for key in arrived}
            claimed = replays.claim(
                conn, self._run_id, resource_type, LOAD_STAGES, committed_runs, also_open=self._also_open
            )
            replays.record_origin(conn, self._run_id, resource_type, list(arrived))
            conn.commit()
            if not claimed:
                return ReplayLoadResult()
            view_tables.ensure_tables(conn, self._views)
            conn.commit()
        resolved = failed = 0
        with self._connect() as reading, self._connect() as writing:
            row_builder = RowBuilder(
                self._views, cipher_of(writing), writing.source, with_subjects=self._consent_gate.withholds
            )
            for batch in replays.stream_claimed(reading, self._run_id, resource_type, LOAD_STAGES, list(arrived)):
                with writing.transaction():
                    failures = self._load(writing, row_builder, resource_type, batch, arrived)
                failed += failures
                resolved += len(batch) - failures
        return ReplayLoadResult(resolved, failed)

    def _load(
        self,
        conn: Session,
        row_builder: RowBuilder,
        resource_type: str,
        dead_letters: Sequence[ClaimedDeadLetter],
        arrived: Mapping[str, datetime],
    ) -> int:
        """Load the dead letters of one transaction and return how many of them failed again."""
        loader = Loader(
            conn, resource_type, self._views, run_id=self._run_id, restore_rows=True, consent_gate=self._consent_gate
        )
        with_identifiers = identifiers.hold_type(conn, resource_type)
        failed: dict[int, FailedReplay] = {}
        by_resource = {(dead_letter.partition_key, dead_letter.body): dead_letter for dead_letter in dead_letters}
        unloadable = []
        for dead_letter in dead_letters:
            key = dead_letter.partition_key
            batch = build_batch_of_one(dead_letter.body, dead_letter, arrived[key])
            batch = batch._replace(with_identifiers=with_identifiers)
            rows = row_builder(batch)
            for line in rows.rejected:
                failed[dead_letter.id] = self._build_failure(dead_letter, line.rule, line.path, line.message)
            unloadable += loader.add_block(rows.block, batch.lines, key, batch.arrivals)
        counts = loader.finish()
        for item in [*unloadable, *loader.take_unloadable()]:
            dead_letter = by_resource[item.partition_key, item.body]
            path = format_column_path(item.view, item.column)
            failed[dead_letter.id] = self._build_failure(dead_letter, "unloadable", path, item.message)
        replays.record_failures(conn, self._run_id, list(failed.values()))
        resolved = [dead_letter for dead_letter in dead_letters if dead_letter.id not in failed]
        replays.resolve_by_ids(conn, self._run_id, [dead_letter.id for dead_letter in resolved])
        if self._written_to:
            keys = {dead_letter.partition_key for dead_letter in resolved}
            held_windows.hold(conn, self._written_to, resource_type, keys, run_id=self._run_id)
        audit_log.record(
            conn, *build_load_audit_records(resource_type, counts, run_id=self._run_id, detail={"replay": True})
        )
        return len(failed)

    def _build_failure(self, dead_letter: ClaimedDeadLetter, rule: str, path: str, message: str) -> FailedReplay:
        return FailedReplay(dead_letter.id, rule, path, message, [], compute_views_ruleset(self._views))
