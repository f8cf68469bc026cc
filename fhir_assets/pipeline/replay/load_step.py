"""Dead letters judged again: only their own lines, not their windows.

What heals becomes a further part of the validated partition, beside the tallies that are mended, and goes on from there
as any other part does. The manifest names the run (``replay:<run>``), so that a replay that was cut short after its
commit is not done twice: a letter that is still held by a run which the manifest names has healed.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime

from fhir_assets.fhir.views import View
from fhir_assets.pipeline.load.row_builder import Batch, RowBuilder, format_column_path
from fhir_assets.pipeline.load.step import STAGES as LOAD_STAGES
from fhir_assets.pipeline.load.step import build_load_audit_records, compute_views_ruleset
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.warehouse.ops import audit_log, replays
from fhir_assets.warehouse.ops.replays import Claimed, Failed
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session, cipher_of
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets.warehouse.postgres.tables.loading import NO_CONSENT_GATE, Loader
from fhir_assets.windows import Window


class ReplayLoadStep:
    """Loads the letters of stages ``transform`` and ``load`` that a run claims, into all tables of their type."""

    def __init__(
        self,
        connect: OpenSession,
        views: Sequence[View],
        *,
        run_id: str,
        also_open: bool,
        consent_gate: ConsentGate = NO_CONSENT_GATE,
    ) -> None:
        self._connect = connect
        self._views = views
        self._consent_gate = consent_gate
        self._run_id = run_id
        self._also_open = also_open

    def run(self, resource_type: str, windows: Sequence[Window]) -> int:
        """Load the letters of some windows, a few hundred a transaction; what fails again is open again. Returns how
        many healed. Raises DatabaseUnavailable, ViewError or SealingError.
        """
        arrived = {window.key: window.start or window.end for window in windows}
        with self._connect() as conn:
            healed_by: dict[str, list[str]] = {key: [] for key in arrived}
            claimed = replays.claim(
                conn, self._run_id, resource_type, LOAD_STAGES, healed_by, also_open=self._also_open
            )
            replays.note_origin(conn, self._run_id, resource_type, list(arrived))
            conn.commit()
            if not claimed:
                return 0
            view_tables.ensure_tables(conn, self._views)
            conn.commit()
        healed = 0
        with self._connect() as reading, self._connect() as writing:
            make = RowBuilder(self._views, cipher_of(writing))
            for letters in replays.claimed(reading, self._run_id, resource_type, LOAD_STAGES, list(arrived)):
                with writing.transaction():
                    healed += self._load(writing, make, resource_type, letters, arrived)
        return healed

    def _load(
        self,
        conn: Session,
        make: RowBuilder,
        resource_type: str,
        letters: Sequence[Claimed],
        arrived: Mapping[str, datetime],
    ) -> int:
        loader = Loader(
            conn, resource_type, self._views, run_id=self._run_id, restore_rows=True, consent_gate=self._consent_gate
        )
        failed: dict[int, Failed] = {}
        by_place = {(letter.partition_key, letter.body): letter for letter in letters}
        refused = []
        for letter in letters:
            made = make(Batch([letter.body], letter.partition_key, arrived[letter.partition_key]))
            for undone in made.rejected:
                failed[letter.id] = self._failed(letter, undone.rule, undone.path, undone.message)
            refused += loader.add_block(made.block, [letter.body], letter.partition_key)
        counts = loader.finish()
        for item in [*refused, *loader.take_unloadable()]:
            letter = by_place[item.partition_key, item.body]
            failed[letter.id] = self._failed(
                letter, "unloadable", format_column_path(item.view, item.column), item.message
            )
        replays.failed(conn, self._run_id, list(failed.values()))
        healed = [letter.id for letter in letters if letter.id not in failed]
        replays.healed_letters(conn, self._run_id, healed)
        audit_log.record(
            conn, *build_load_audit_records(resource_type, counts, run_id=self._run_id, detail={"replay": True})
        )
        return len(healed)

    def _failed(self, letter: Claimed, rule: str, path: str, message: str) -> Failed:
        return Failed(letter.id, rule, path, message, [], compute_views_ruleset(self._views))
