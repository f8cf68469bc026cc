"""Consent carried out: whose decision changed, his resources leave the tables or come into them, children included."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from itertools import groupby
from typing import Any

import msgspec

from fhir_assets.fhir.compartment import find_patient_ids
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.load.row_builder import Batch, RowBuilder
from fhir_assets.pipeline.load.step import build_unloadable_dead_letter
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.warehouse.ops import audit_log, consents, dead_letters, withheld_resources
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session, cipher_of
from fhir_assets.warehouse.postgres.queries import compartments
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets.warehouse.postgres.tables.loading import Loader

_PATIENTS_AT_ONCE = 50
"""Patients whose decisions are made and carried out in one transaction, while loads wait."""

_RESOURCES_AT_ONCE = 2000

_parse = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal).decode


@dataclass(slots=True)
class ConsentResult:
    """What came of it: patients decided on, decisions that are other ones now, resources withheld and released."""

    patients: int = 0
    decisions: int = 0
    withheld: int = 0
    released: int = 0


class ConsentStep:
    """Brings the tables to what the patients' consents say now. Does nothing, with one query, if nothing changed.

    Each batch is a transaction of its own, so that it can be stopped at any time and goes on where it was.
    """

    def __init__(
        self, connect: OpenSession, views: Sequence[View], gate: ConsentGate, *, run_id: str, actor: str
    ) -> None:
        self._connect = connect
        self._gate = gate
        self._run_id = run_id
        self._actor = actor
        self._views = sorted(views, key=lambda view: view.resource_type)
        self._make_rows: dict[str, RowBuilder] = {}

    def run(self, now: datetime) -> ConsentResult:
        """Carry out what is due at ``now``. Raises DatabaseUnavailable, ViewError or SealingError."""
        swept = ConsentResult()
        with self._connect() as conn:
            followed = consents.get_applied_policy(conn)
            if not followed.closed and not self._gate.closed:
                return swept
            if followed != self._gate:
                view_tables.ensure_tables(conn, self._views)
                if not followed.closed:
                    self._take_stock(conn)
            while patients := consents.find_due_patients(conn, now, _PATIENTS_AT_ONCE):
                if not swept.patients:
                    view_tables.ensure_tables(conn, self._views)
                conn.commit()
                with conn.transaction():
                    consents.lock_decisions_for_change(conn)
                    self._decide(conn, patients, now, swept)
            conn.commit()
            if followed != self._gate:
                self._follow(conn, swept)
        return swept

    def _decide(self, conn: Session, patients: Sequence[str], now: datetime, swept: ConsentResult) -> None:
        changed = consents.update_decisions(conn, patients, now)
        swept.patients += len(patients)
        swept.decisions += changed
        taken = withheld_resources.withhold_resources(conn, self._gate, patients=patients)
        released = self._release(conn, patients=patients)
        swept.withheld += sum(taken.values())
        swept.released += sum(released.values())
        self._record(conn, changed, taken, released)

    def _follow(self, conn: Session, swept: ConsentResult) -> None:
        """The policy is another one: all of the tables, and all that is withheld, is looked through."""
        while True:
            with conn.transaction():
                consents.lock_decisions_for_change(conn)
                taken = withheld_resources.withhold_resources(conn, self._gate, limit=_RESOURCES_AT_ONCE)
                self._record(conn, 0, taken, {})
            swept.withheld += sum(taken.values())
            if not taken:
                break
        while True:
            with conn.transaction():
                consents.lock_decisions_for_change(conn)
                released = self._release(conn, limit=_RESOURCES_AT_ONCE)
                self._record(conn, 0, {}, released)
            swept.released += sum(released.values())
            if not released:
                break
        with conn.transaction():
            consents.set_applied_policy(conn, self._gate)
        conn.commit()

    def _record(self, conn: Session, decisions: int, taken: Mapping[str, int], released: Mapping[str, int]) -> None:
        audit_log.record(
            conn,
            AuditRecord("consent decision", self._actor, "Consent", count=decisions, run_id=self._run_id),
            *(
                AuditRecord("withhold", self._actor, name, count=count, run_id=self._run_id)
                for name, count in taken.items()
            ),
            *(
                AuditRecord("release", self._actor, name, count=count, run_id=self._run_id)
                for name, count in released.items()
            ),
        )

    def _release(
        self, conn: Session, *, patients: Sequence[str] | None = None, limit: int | None = None
    ) -> dict[str, int]:
        """Bring into the tables what of some patients (None: of all) is withheld and need not be. By type."""
        released: dict[str, int] = {}
        at_once = min(limit or _RESOURCES_AT_ONCE, _RESOURCES_AT_ONCE)
        while releasable := withheld_resources.find_releasable(conn, self._gate, patients=patients, limit=at_once):
            for (resource_type, partition_key), group in groupby(
                releasable, key=lambda resource: (resource.resource_type, resource.partition_key)
            ):
                resources = list(group)
                bodies = [resource.body for resource in resources]
                # Resources without lastUpdated have the earliest time that their window knows.
                arrived = min(resource.as_of for resource in resources)
                self._load(conn, resource_type, Batch(bodies, partition_key, arrived))
                withheld_resources.remove_released(conn, resource_type, [resource.id for resource in resources])
                released[resource_type] = released.get(resource_type, 0) + len(resources)
            if limit is not None:
                break
        return released

    def _load(self, conn: Session, resource_type: str, batch: Batch) -> None:
        """Load released resources; one that does not load becomes a dead letter, as it would have."""
        views = [view for view in self._views if view.resource_type == resource_type]
        make = self._make_rows.get(resource_type)
        if make is None:
            make = self._make_rows[resource_type] = RowBuilder(views, cipher_of(conn))
        rows = make(batch)
        loader = Loader(conn, resource_type, views, run_id=self._run_id, restore_rows=True)
        bad = loader.add_block(rows.block, batch.lines, batch.partition_key)
        loader.finish()
        letters = [undone.build_dead_letter(resource_type, batch) for undone in rows.rejected]
        letters += [build_unloadable_dead_letter(resource_type, item) for item in [*bad, *loader.take_unloadable()]]
        dead_letters.record(conn, self._run_id, letters)

    def _take_stock(self, conn: Session) -> None:
        """A policy is switched on: look up what nobody looked at before, in batches."""
        while True:
            with conn.transaction():
                resources = compartments.lock_unassigned_resources(conn, _RESOURCES_AT_ONCE)
                compartments.set_patients(
                    conn,
                    [
                        (list(find_patient_ids(_parse(resource.body))), resource.resource_type, resource.id)
                        for resource in resources
                    ],
                )
            if not resources:
                break
        with conn.transaction():
            consents.record_loaded_consents(conn)
        conn.commit()
