"""Resolves conditional references (``Patient?identifier=system|value``) by the identifiers of loaded resources.

A load writes rows of resources before their conditional references are resolved; the key columns are empty then. This
step runs after each load and examines all resources with unresolved references, of any type, because the load may have
written their targets. Two concurrent loads miss nothing, because each runs the step after its commit.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from time import monotonic, sleep

from fhir_assets.fhir.conditional_references import get_type
from fhir_assets.fhir.identifier_tokens import list_own_tokens
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.load.row_builder import Batch, RowBuilder, parse_resource
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.warehouse.ops import consents
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session, cipher_of
from fhir_assets.warehouse.postgres.queries import identifiers
from fhir_assets.warehouse.postgres.queries.identifiers import LockedResource, ResolvedResource
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets.warehouse.postgres.tables.loading import NO_CONSENT_GATE, Loader

_RESOURCES_PER_TRANSACTION = 1000
_BUSY_SECONDS = 20.0
"""For how long a step waits for rows that loads have locked.

The remaining resources are resolved after the next load.
"""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ConditionalReferenceStep:
    """Writes the keys of conditional references into the rows of resources once the targets are loaded.

    A reference stays without a key if several resources match it, or if consent withholds the target. Each batch is
    committed separately, so that a run continues where a stopped run ended.
    """

    def __init__(
        self, connect: OpenSession, views: Sequence[View], *, run_id: str, consent_gate: ConsentGate = NO_CONSENT_GATE
    ) -> None:
        self._connect = connect
        self._consent_gate = consent_gate
        self._run_id = run_id
        self._views = {
            name: list(group)
            for name, group in groupby(
                sorted(views, key=lambda view: view.resource_type), key=lambda view: view.resource_type
            )
        }
        self._row_builders: dict[str, RowBuilder] = {}

    def run(self) -> int:
        """Resolve the references whose targets are loaded. Return the number of resources whose rows were written
        again.

        Raises DatabaseUnavailable, ViewError or EncryptionError.
        """
        with self._connect() as conn:
            with conn.transaction():
                identifiers.mark_outdated_tokens(conn)
            types = [name for name in identifiers.find_waiting_types(conn) if name in self._views]
            conn.commit()
            if not types:
                return 0
            view_tables.ensure_tables(conn, [view for name in types for view in self._views[name]])
            conn.commit()
            return sum(self._resolve_type(conn, name) for name in types)

    def _resolve_type(self, conn: Session, resource_type: str) -> int:
        """Resolve the references of all resources of a type that have unresolved ones."""
        resolved = 0
        with self._connect() as reading:
            for ids, conditions in identifiers.stream_waiting(reading, resource_type):
                # The conditions of resources that were never examined are known after the first pass.
                count, new_conditions = self._resolve_batch(conn, resource_type, ids, conditions)
                resolved += count
                if new_conditions:
                    resolved += self._resolve_batch(conn, resource_type, ids, new_conditions)[0]
        return resolved

    def _resolve_batch(
        self, conn: Session, resource_type: str, ids: Sequence[str], conditions: set[str]
    ) -> tuple[int, set[str]]:
        """Resolve the references of a batch.

        Return the number of resolved resources, and conditions not in ``conditions``.
        """
        for target in sorted({get_type(condition) for condition in conditions}):
            self._identify_type(conn, target)
        with conn.transaction():
            if self._consent_gate.withholds:
                consents.lock_decisions_for_load(conn)
            with_identifiers = identifiers.hold_type(conn, resource_type)
            targets = identifiers.find_targets(conn, conditions)
            locked = identifiers.lock_waiting(conn, resource_type, ids, targets)
            found = self._rebuild(conn, resource_type, locked, targets, with_identifiers)
        new = {token for resource in found for token in resource.identifiers if token.startswith("?") and token != "?"}
        return len(found), new - conditions

    def _rebuild(
        self,
        conn: Session,
        resource_type: str,
        locked: Sequence[LockedResource],
        targets: Mapping[str, str],
        with_identifiers: bool,
    ) -> list[ResolvedResource]:
        """Write the rows of resources again, with the keys of their references."""
        if not locked:
            return []
        bodies = [resource.body for resource in locked]
        batch = Batch(bodies, "", _EPOCH, targets=targets, with_identifiers=with_identifiers)
        row_builder = self._get_row_builder(conn, resource_type)
        loader = Loader(conn, resource_type, self._views[resource_type], run_id=self._run_id, reencrypt=True)
        built = row_builder(batch)
        refused = {line.resource_id for line in built.rejected}
        refused.update(item.resource_id for item in loader.add_block(built.block, bodies, ""))
        loader.finish()
        refused.update(item.resource_id for item in loader.take_unloadable())
        found = read_resolved(row_builder, batch, with_patients=not self._consent_gate.withholds)
        resolved = [resource for resource in found if resource.id not in refused]
        identifiers.store_resolved(conn, resource_type, resolved)
        return resolved

    def _get_row_builder(self, conn: Session, resource_type: str) -> RowBuilder:
        if resource_type not in self._row_builders:
            self._row_builders[resource_type] = RowBuilder(
                self._views[resource_type], cipher_of(conn), conn.source, with_subjects=self._consent_gate.withholds
            )
        return self._row_builders[resource_type]

    def _identify_type(self, conn: Session, resource_type: str) -> None:
        """Determine the identifiers of all loaded resources of a type, unless they are known."""
        deadline = monotonic() + _BUSY_SECONDS
        while not identifiers.is_complete(conn, resource_type):
            conn.commit()
            with conn.transaction():
                is_added = identifiers.add_type(conn, resource_type)
            if is_added:
                self._fill(conn, resource_type)
                with conn.transaction():
                    if identifiers.mark_complete(conn, resource_type):
                        return
            if monotonic() > deadline:
                return
            sleep(0.1)
        conn.commit()

    def _fill(self, conn: Session, resource_type: str) -> None:
        """Store the tokens of all resources of a type whose rows no other transaction has locked."""
        hash_identifier = cipher_of(conn).fingerprint
        after = ""
        while True:
            with conn.transaction():
                batch = identifiers.lock_unidentified(conn, resource_type, after, _RESOURCES_PER_TRANSACTION)
                tokens = (
                    (resource.id, list_own_tokens(parse_resource(resource.body).get("identifier"), hash_identifier))
                    for resource in batch
                )
                identifiers.set_identifiers(conn, resource_type, tokens)
            if not batch:
                return
            after = batch[-1].id


def read_resolved(row_builder: RowBuilder, batch: Batch, *, with_patients: bool) -> Iterator[ResolvedResource]:
    """Yield the values in the rows of a batch that depend on the targets of its references."""
    for line in batch.lines:
        record = row_builder.read(line, batch)
        if record is not None:
            yield ResolvedResource(
                record.id,
                record.identifiers or (),
                record.keyless or (),
                record.patients if with_patients else None,
                record.mentions,
            )
