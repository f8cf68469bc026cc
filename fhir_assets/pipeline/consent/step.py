"""Apply consent: resources of patients whose decision changed leave the tables or return to them."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from itertools import groupby
from typing import Any

import msgspec

from fhir_assets.fhir import subjects
from fhir_assets.fhir.references import Bases
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.load.row_builder import Batch, RowBuilder
from fhir_assets.pipeline.load.step import build_unloadable_dead_letter
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.privacy.consent import ConsentGate, may_deny
from fhir_assets.storage.manifest import Arrival
from fhir_assets.warehouse.ops import (
    audit_log,
    consent_records,
    consents,
    dead_consents,
    dead_letters,
    withheld_changes,
)
from fhir_assets.warehouse.ops.consents import AppliedPolicy
from fhir_assets.warehouse.ops.dead_consents import DeadConsent, PossibleDenial
from fhir_assets.warehouse.ops.withheld_changes import ResourceKey
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session, cipher_of
from fhir_assets.warehouse.postgres.queries import compartments, identifiers
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets.warehouse.postgres.tables.loading import Loader

_PATIENTS_PER_TRANSACTION = 50
"""Patients whose decisions are updated and applied in one transaction. Loads wait during such a transaction."""

_RESOURCES_PER_TRANSACTION = 2000

_find_patient_references = re.compile(
    rb'"reference"\s*:\s*"(?:[^"\\]*/)?Patient/([A-Za-z0-9\-.]{1,64})(?=["/])'
).findall
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

    A run without changes sends four queries. Each batch is committed separately, so that a run continues where a
    stopped run ended.
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
            gate = self._consent_gate
            if not applied.consent_gate.withholds and not gate.withholds:
                return total
            wanted = AppliedPolicy(gate, self._identify_subjects(conn) if gate.withholds else None)
            if applied != wanted:
                view_tables.ensure_tables(conn, self._views)
                if gate.withholds and (applied.subjects != wanted.subjects or not applied.consent_gate.withholds):
                    self._assign_subjects(conn, reset=applied.subjects not in (None, wanted.subjects))
            if gate.withholds:
                self._record_dead_consents(conn)
            total += self._apply_all(conn, now)
            if applied != wanted:
                total += self._apply_policy(conn, wanted)
                total += self._apply_all(conn, now)
        return total

    def _record_dead_consents(self, conn: Session) -> None:
        """Record the possible effects of Consents that are dead letters, and remove those of resolved dead letters."""
        if dead_consents.is_changed(conn):
            conn.commit()
            with conn.transaction():
                dead_consents.remove_resolved(conn)
            while found := dead_consents.find_unrecorded(conn, _RESOURCES_PER_TRANSACTION):
                conn.commit()
                with conn.transaction():
                    for consent in found:
                        denial = self._read_dead_consent(conn, consent)
                        dead_consents.record(conn, denial, by_file=self._consent_gate.by_file)
        conn.commit()

    def _read_dead_consent(self, conn: Session, consent: DeadConsent) -> PossibleDenial:
        """Return the possible effect of a dead letter.

        If it is not JSON, all references to Patients in its text count.
        """
        body = consent.body or b""
        try:
            resource = _parse(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            named = sorted({reference.decode() for reference in _find_patient_references(body)})
            return PossibleDenial(consent, True, named, ())
        if not may_deny(resource):
            return PossibleDenial(consent, False, (), ())
        found = subjects.find_subjects(
            {**resource, "resourceType": "Consent"}, self._reference_bases, cipher_of(conn).fingerprint
        )
        ids = [patient for patient in found.patients if patient[0] not in "?#"]
        tokens = [mention[1:] for mention in found.mentions if mention.startswith("!")]
        return PossibleDenial(consent, True, ids, tokens)

    def _apply_all(self, conn: Session, now: datetime) -> ConsentResult:
        """Apply all decisions that are due, then examine all marked withheld resources."""
        total = ConsentResult()
        while True:
            if patients := consents.find_due_patients(conn, now, _PATIENTS_PER_TRANSACTION):
                if not total.patients:
                    view_tables.ensure_tables(conn, self._views)
                conn.commit()
                with conn.transaction():
                    consents.lock_decisions_for_change(conn)
                    total += self._apply_decisions(conn, patients, now)
            elif withheld_changes.find_due(conn, 1):
                conn.commit()
                with conn.transaction():
                    consents.lock_decisions_for_change(conn)
                    total += self._apply_to_withheld(conn)
            else:
                conn.commit()
                return total

    def _apply_decisions(self, conn: Session, patients: Sequence[str], now: datetime) -> ConsentResult:
        """Update the decisions on patients, and withhold the loaded resources that they concern."""
        changed = consents.update_decisions(conn, patients, now)
        withheld = withheld_changes.withhold_resources(conn, self._consent_gate, keys=patients)
        withheld_changes.mark_due(conn, patients)
        self._record(conn, changed, withheld, {})
        return ConsentResult(len(patients), changed, sum(withheld.values()))

    def _apply_to_withheld(self, conn: Session) -> ConsentResult:
        """Release those of a batch of marked resources that may be, and withhold what refers to the others."""
        batch = withheld_changes.find_due(conn, _RESOURCES_PER_TRANSACTION)
        withheld_changes.clear_due(conn, batch)
        if resolved := withheld_changes.resolve_patients(conn, batch):
            consent_records.record_resolved_consents(conn, resolved)
        withheld_changes.update_direct(conn, self._consent_gate, batch)
        released = self._release(conn, batch)
        remaining = [key for key in batch if key not in released]
        withheld = withheld_changes.withhold_referring(conn, remaining)
        released_by_type = Counter(resource_type for resource_type, _ in released)
        self._record(conn, 0, withheld, released_by_type)
        return ConsentResult(withheld=sum(withheld.values()), released=len(released))

    def _apply_policy(self, conn: Session, policy: AppliedPolicy) -> ConsentResult:
        """Apply a changed policy to all resources in the tables, and mark all withheld resources."""
        total = ConsentResult()
        while True:
            with conn.transaction():
                consents.lock_decisions_for_change(conn)
                withheld = withheld_changes.withhold_resources(
                    conn, self._consent_gate, limit=_RESOURCES_PER_TRANSACTION
                )
                self._record(conn, 0, withheld, {})
            total += ConsentResult(withheld=sum(withheld.values()))
            if not withheld:
                break
        with conn.transaction():
            withheld_changes.mark_due(conn, None)
            consents.set_applied_policy(conn, policy)
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

    def _release(self, conn: Session, batch: Sequence[ResourceKey]) -> set[ResourceKey]:
        """Load those of the withheld resources that may be released, and return them."""
        released: set[ResourceKey] = set()
        for (resource_type, partition_key, dated), group in groupby(
            withheld_changes.find_releasable(conn, batch),
            key=lambda resource: (resource.resource_type, resource.partition_key, resource.dated),
        ):
            resources = list(group)
            bodies = [resource.body for resource in resources]
            arrivals = tuple(Arrival(1, resource.arrived) for resource in resources)
            self._load(conn, resource_type, Batch(bodies, partition_key, resources[0].arrived, arrivals, dated))
            withheld_changes.remove_released(conn, resource_type, [resource.id for resource in resources])
            released.update((resource_type, resource.id) for resource in resources)
        return released

    def _load(self, conn: Session, resource_type: str, batch: Batch) -> None:
        """Load released resources. Resources that cannot be loaded are recorded as dead letters, as in a load."""
        views = [view for view in self._views if view.resource_type == resource_type]
        row_builder = self._row_builders.get(resource_type)
        if row_builder is None:
            row_builder = self._row_builders[resource_type] = RowBuilder(
                views, cipher_of(conn), conn.source, with_subjects=self._consent_gate.withholds
            )
        rows = row_builder(batch._replace(with_identifiers=identifiers.hold_type(conn, resource_type)))
        loader = Loader(conn, resource_type, views, run_id=self._run_id, restore_rows=True, record_consents=False)
        unloadable = loader.add_block(rows.block, batch.lines, batch.partition_key)
        loader.finish()
        unloadable += loader.take_unloadable()
        rejected = [line.build_dead_letter(resource_type, batch) for line in rows.rejected]
        rejected += [build_unloadable_dead_letter(resource_type, item) for item in unloadable]
        dead_letters.record(conn, self._run_id, rejected)

    def _identify_subjects(self, conn: Session) -> str:
        """Return the ``subjects`` of AppliedPolicy: a text that changes with the rules that find subjects."""
        bases = "\n".join(sorted(self._reference_bases or ("any",)))
        return f"{subjects.REVISION}-{cipher_of(conn).fingerprint(bases.encode()).hex()}"

    @property
    def _reference_bases(self) -> Bases:
        return self._views[0].reference_bases if self._views else None

    def _assign_subjects(self, conn: Session, *, reset: bool) -> None:
        """Record, in batches, the subjects of resources that were loaded before a consent policy was switched on.

        With ``reset``, those of all resources are recorded again.
        """
        hash_identifier = cipher_of(conn).fingerprint
        if reset:
            compartments.reset_subjects(conn)
            conn.commit()
        for table in compartments.TABLES:
            while True:
                with conn.transaction():
                    resources = compartments.lock_unassigned_resources(conn, table, _RESOURCES_PER_TRANSACTION)
                    compartments.set_subjects(
                        conn,
                        table,
                        [
                            (
                                *subjects.find_subjects(_parse(resource.body), self._reference_bases, hash_identifier),
                                resource.resource_type,
                                resource.id,
                            )
                            for resource in resources
                        ],
                    )
                if not resources:
                    break
        with conn.transaction():
            withheld_changes.resolve_loaded_patients(conn)
            consent_records.record_loaded_consents(conn, by_file=self._consent_gate.by_file)
        conn.commit()
