"""Apply consent: resources of patients whose decision changed leave the tables or return to them."""

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
from fhir_assets.storage.manifest import Arrival
from fhir_assets.warehouse.ops import audit_log, consents, dead_letters, withheld_resources
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session, cipher_of
from fhir_assets.warehouse.postgres.queries import compartments
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets.warehouse.postgres.tables.loading import Loader

_PATIENTS_PER_TRANSACTION = 50
"""Patients whose decisions are updated and applied in one transaction. Loads wait during such a transaction."""

_RESOURCES_PER_TRANSACTION = 2000

_parse = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal).decode


@dataclass(frozen=True, slots=True)
class ConsentResult:
    """The counts of one application of consent."""

    patients: int = 0
    """Patients whose decisions were computed."""
    decisions: int = 0
    """Decisions that changed."""
    withheld: int = 0
    """Resources that were removed from the tables."""
    released: int = 0
    """Withheld resources that were loaded into the tables again."""

    def __add__(self, other: "ConsentResult") -> "ConsentResult":
        return ConsentResult(
            self.patients + other.patients,
            self.decisions + other.decisions,
            self.withheld + other.withheld,
            self.released + other.released,
        )


class ConsentStep:
    """Makes the tables match the patients' current consents: withholds resources, and releases withheld ones.

    A run without changes sends two queries. Each batch is committed by itself, so that the next run continues a stopped
    one.
    """

    def __init__(
        self, connect: OpenSession, views: Sequence[View], consent_gate: ConsentGate, *, run_id: str, actor: str
    ) -> None:
        self._connect = connect
        self._consent_gate = consent_gate
        self._run_id = run_id
        self._actor = actor
        self._views = sorted(views, key=lambda view: view.resource_type)
        self._row_builders: dict[str, RowBuilder] = {}

    def run(self, now: datetime) -> ConsentResult:
        """Apply the decisions that are due at ``now``, and the policy if it changed.

        Raises DatabaseUnavailable, ViewError or EncryptionError.
        """
        total = ConsentResult()
        with self._connect() as conn:
            applied = consents.get_applied_policy(conn)
            if not applied.withholds and not self._consent_gate.withholds:
                return total
            if applied != self._consent_gate:
                view_tables.ensure_tables(conn, self._views)
                if not applied.withholds:
                    self._assign_patients(conn)
            while patients := consents.find_due_patients(conn, now, _PATIENTS_PER_TRANSACTION):
                if not total.patients:
                    view_tables.ensure_tables(conn, self._views)
                conn.commit()
                with conn.transaction():
                    consents.lock_decisions_for_change(conn)
                    total += self._apply_decisions(conn, patients, now)
            conn.commit()
            if applied != self._consent_gate:
                total += self._apply_policy(conn)
        return total

    def _apply_decisions(self, conn: Session, patients: Sequence[str], now: datetime) -> ConsentResult:
        changed = consents.update_decisions(conn, patients, now)
        withheld = withheld_resources.withhold_resources(conn, self._consent_gate, patients=patients)
        released = self._release(conn, patients=patients)
        self._record(conn, changed, withheld, released)
        return ConsentResult(len(patients), changed, sum(withheld.values()), sum(released.values()))

    def _apply_policy(self, conn: Session) -> ConsentResult:
        """Apply a changed policy to all resources in the tables and to all withheld resources."""
        total = ConsentResult()
        while True:
            with conn.transaction():
                consents.lock_decisions_for_change(conn)
                withheld = withheld_resources.withhold_resources(
                    conn, self._consent_gate, limit=_RESOURCES_PER_TRANSACTION
                )
                self._record(conn, 0, withheld, {})
            total += ConsentResult(withheld=sum(withheld.values()))
            if not withheld:
                break
        while True:
            with conn.transaction():
                consents.lock_decisions_for_change(conn)
                released = self._release(conn, limit=_RESOURCES_PER_TRANSACTION)
                self._record(conn, 0, {}, released)
            total += ConsentResult(released=sum(released.values()))
            if not released:
                break
        with conn.transaction():
            consents.set_applied_policy(conn, self._consent_gate)
        conn.commit()
        return total

    def _record(self, conn: Session, decisions: int, withheld: Mapping[str, int], released: Mapping[str, int]) -> None:
        audit_log.record(
            conn,
            AuditRecord("consent decision", self._actor, "Consent", count=decisions, run_id=self._run_id),
            *(
                AuditRecord("withhold", self._actor, name, count=count, run_id=self._run_id)
                for name, count in withheld.items()
            ),
            *(
                AuditRecord("release", self._actor, name, count=count, run_id=self._run_id)
                for name, count in released.items()
            ),
        )

    def _release(
        self, conn: Session, *, patients: Sequence[str] | None = None, limit: int | None = None
    ) -> dict[str, int]:
        """Load the withheld resources of patients (None: of all) that may be released. Return their number by type."""
        released: dict[str, int] = {}
        batch_size = min(limit or _RESOURCES_PER_TRANSACTION, _RESOURCES_PER_TRANSACTION)
        while releasable := withheld_resources.find_releasable(
            conn, self._consent_gate, patients=patients, limit=batch_size
        ):
            for (resource_type, partition_key, dated), group in groupby(
                releasable, key=lambda resource: (resource.resource_type, resource.partition_key, resource.dated)
            ):
                resources = list(group)
                bodies = [resource.body for resource in resources]
                arrivals = tuple(Arrival(1, resource.arrived) for resource in resources)
                self._load(conn, resource_type, Batch(bodies, partition_key, resources[0].arrived, arrivals, dated))
                withheld_resources.remove_released(conn, resource_type, [resource.id for resource in resources])
                released[resource_type] = released.get(resource_type, 0) + len(resources)
            if limit is not None:
                break
        return released

    def _load(self, conn: Session, resource_type: str, batch: Batch) -> None:
        """Load released resources. Resources that cannot be loaded are recorded as dead letters, as in a load."""
        views = [view for view in self._views if view.resource_type == resource_type]
        row_builder = self._row_builders.get(resource_type)
        if row_builder is None:
            row_builder = self._row_builders[resource_type] = RowBuilder(views, cipher_of(conn))
        rows = row_builder(batch)
        loader = Loader(conn, resource_type, views, run_id=self._run_id, restore_rows=True)
        unloadable = loader.add_block(rows.block, batch.lines, batch.partition_key)
        loader.finish()
        unloadable += loader.take_unloadable()
        rejected = [line.build_dead_letter(resource_type, batch) for line in rows.rejected]
        rejected += [build_unloadable_dead_letter(resource_type, item) for item in unloadable]
        dead_letters.record(conn, self._run_id, rejected)

    def _assign_patients(self, conn: Session) -> None:
        """Record, in batches, the patients of resources that were loaded before a consent policy was switched on."""
        bases = self._views[0].reference_bases if self._views else None
        while True:
            with conn.transaction():
                resources = compartments.lock_unassigned_resources(conn, _RESOURCES_PER_TRANSACTION)
                compartments.set_patients(
                    conn,
                    [
                        (list(find_patient_ids(_parse(resource.body), bases)), resource.resource_type, resource.id)
                        for resource in resources
                    ],
                )
            if not resources:
                break
        with conn.transaction():
            consents.record_loaded_consents(conn)
        conn.commit()
