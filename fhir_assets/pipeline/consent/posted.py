"""The decisions of posted Consents, which take effect before the Consents are loaded."""

from collections.abc import Callable, Sequence
from datetime import datetime

import psycopg

from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.fhir.record import Record
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.load.row_builder import Batch, RowBuilder
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.storage.manifest import Arrival
from fhir_assets.warehouse.ops import audit_log, consents
from fhir_assets.warehouse.postgres.db.connections import Session, cipher_of
from fhir_assets.warehouse.postgres.tables.copy_chunks import PartitionBlock
from fhir_assets.warehouse.postgres.tables.posted_consents import record_posted_consents
from fhir_assets.windows import WindowScheme

_ATTEMPTS = 3
"""The maximum number of attempts, because a load of the same Consents may cause a deadlock."""


class PostedDecisions:
    """Records the decisions of posted Consents, in the transaction that receives them.

    Reads through the API follow the decisions immediately. The tables are updated when the Consents are loaded, or when
    consent is applied. ``list_views`` returns the views of the deployment, whose reference bases determine which
    patients a Consent names.
    """

    def __init__(
        self, list_views: Callable[[], Sequence[View]], consent_gate: ConsentGate, scheme: WindowScheme
    ) -> None:
        self._list_views = list_views
        self._consent_gate = consent_gate
        self._scheme = scheme

    def record(self, conn: Session, records: Sequence[Record], *, actor: str, now: datetime) -> None:
        """Decide, as of ``now``, about the patients of the Consents in ``records``.

        The caller records the origin of the records in the same transaction. Without a policy that withholds, nothing
        is done. Raises DatabaseUnavailable or EncryptionError; the caller then rolls the transaction back.
        """
        posted = [record for record in records if record.resource_type == "Consent"]
        if not posted or not self._consent_gate.withholds:
            return
        blocks = self._build_blocks(conn, posted, now)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with conn.transaction():
                    consents.lock_decisions_for_post(conn)
                    patients = record_posted_consents(conn, blocks, self._consent_gate)
                    changed = consents.decide_before_load(conn, patients, now)
                    audit_log.record(conn, AuditRecord("consent decision", actor, "Consent", count=changed))
                return
            except psycopg.errors.DeadlockDetected:
                if attempt == _ATTEMPTS:
                    raise DatabaseUnavailable(
                        "A deadlock with loads of Consents prevented the decision of a posted Consent. Nothing was "
                        "received: post it again"
                    ) from None

    def _build_blocks(self, conn: Session, posted: Sequence[Record], now: datetime) -> list[PartitionBlock]:
        views = [view for view in self._list_views() if view.resource_type == "Consent"]
        row_builder = RowBuilder(views, cipher_of(conn), conn.source, with_subjects=True)
        blocks = []
        for record in posted:
            window = self._scheme.window_at(min(record.as_of, now))
            arrivals = (Arrival(1, record.arrived),)
            batch = Batch([record.body], window.key, record.arrived, arrivals, record.dated)
            blocks.append(PartitionBlock(row_builder(batch).block, window.key, batch.lines, arrivals))
        return blocks
