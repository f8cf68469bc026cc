"""Delivers loaded resources to another FHIR server, byte for byte as received.

Resources are read from the validated parts of the windows and compared with ``fhir.resource``. Resources that the
tables do not contain (withheld, deleted or refused) and superseded versions are not delivered.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from fhir_assets.delivery.upload.journal import Failure, Journal
from fhir_assets.delivery.upload.uploader import Uploader
from fhir_assets.fhir import bundles
from fhir_assets.fhir.bundles import BundleEntry
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.record import parse_stored, read_header
from fhir_assets.pipeline.dead_letter_buffer import DeadLetterBuffer
from fhir_assets.pipeline.partition_commit import rewrite_partitions
from fhir_assets.pipeline.reconcile.posts_in_progress import has_recent_posts
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.storage.manifest import Delivered, Manifest, Part
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import audit_log, checkpoints, dead_letter_resolution, dead_letters
from fhir_assets.warehouse.ops.dead_letter_resolution import DeadLetterResolution
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres import resources
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession

_ACTOR = "pipeline"


@dataclass(slots=True)
class DeliveredCounts:
    """The resources of a type, counted by result. ``not_in_tables`` were withheld, deleted or refused by the tables."""

    created: int = 0
    updated: int = 0
    unchanged: int = 0
    failed: int = 0
    superseded: int = 0
    not_in_tables: int = 0


@dataclass(frozen=True, slots=True)
class DeliveryResult:
    """The counts of each type, and by type the windows that have parts that were not in the tables yet."""

    counts: dict[str, DeliveredCounts]
    incomplete: Mapping[str, Sequence[str]]


class DeliverStep:
    """Delivers the resources of windows to the server of ``client``, type by type in load order."""

    def __init__(
        self,
        store: Store,
        connect: OpenSession,
        client: FhirClient,
        *,
        run_id: str,
        refresh: Refresh,
        batch_size: int,
        workers: int,
    ) -> None:
        self._store = store
        self._connect = connect
        self._client = client
        self._run_id = run_id
        self._refresh = refresh
        self._batch_size = batch_size
        self._workers = workers

    def deliver(self, keys_by_type: Mapping[str, Sequence[str]]) -> DeliveryResult:
        """Send the parts of the windows of each type that this server has not received yet.

        Parts that the post loader has validated and not loaded yet are left for a later delivery: their windows are
        ``incomplete``.
        With a refresh other than MISSING, send all parts, except for resources that are unchanged on the server.
        Resources that the server refuses become dead letters of stage ``deliver``. Raises ServerUnavailable,
        ServerRefused, NotFhir, DatabaseUnavailable or StoreError; the windows then remain undelivered.
        """
        counts = {name: DeliveredCounts() for name in keys_by_type}
        validated = [
            manifest
            for name in bundles.sort_types(list(keys_by_type))
            for manifest in self._store.manifests("validated", name, keys_by_type[name])
        ]
        manifests = self._select_loaded(validated)
        incomplete: dict[str, list[str]] = {}
        for found, loaded in zip(validated, manifests, strict=True):
            if found.parts != loaded.parts:
                incomplete.setdefault(found.resource_type, []).append(found.partition_key)
        result = DeliveryResult(counts, incomplete)
        pending = {part.name: (part, manifest) for manifest in manifests for part in self._pending_parts(manifest)}
        steps: dict[str, dict[str, int]] = {}
        for part, manifest in pending.values():
            steps.setdefault(manifest.resource_type, {})[part.name] = part.rows
        if not steps:
            return result
        self._client.capabilities()
        recorded_before = dead_letter_resolution.next_record_number(self._connect)
        with self._connect() as conn, Journal(cipher=self._store.cipher) as journal:
            conn.autocommit = True

            def read(name: str, resource_type: str) -> Iterator[BundleEntry]:
                part, manifest = pending[name]
                return self._current_resources(conn, part, manifest, counts[resource_type])

            Uploader(
                self._client,
                journal,
                batch_size=self._batch_size,
                workers=self._workers,
                skip_unchanged=self._refresh is not Refresh.MISSING,
            ).upload(steps, read)
            for name, total in journal.count_resources().items():
                for outcome, count in total.items():
                    setattr(counts[name], outcome, count)
            self._record_failures(journal, {name: manifest.partition_key for name, (_, manifest) in pending.items()})
        self._record_delivery(
            [manifest for manifest in manifests if manifest.resource_type in steps], counts, recorded_before
        )
        return result

    def _select_loaded(self, manifests: Sequence[Manifest]) -> list[Manifest]:
        """Return the manifests without the parts that the post loader is about to load."""
        now = datetime.now(UTC)
        keys_by_type: dict[str, list[str]] = {}
        for manifest in manifests:
            keys_by_type.setdefault(manifest.resource_type, []).append(manifest.partition_key)
        loaded: dict[tuple[str, str], frozenset[str]] = {}
        with self._connect() as conn:
            for name, keys in keys_by_type.items():
                raw = self._store.manifests("raw", name, keys)
                recent = [found.partition_key for found in raw if has_recent_posts(found, now)]
                if recent:
                    parts_by_key = checkpoints.get_loaded_parts(conn, name, recent)
                    loaded |= {(name, key): parts_by_key.get(key, frozenset()) for key in recent}
        selected = []
        for manifest in manifests:
            names = loaded.get((manifest.resource_type, manifest.partition_key))
            parts = tuple(part for part in manifest.parts if names is None or part.name in names)
            selected.append(msgspec.structs.replace(manifest, parts=parts))
        return selected

    def _pending_parts(self, manifest: Manifest) -> Sequence[Part]:
        """Return the parts of a window that this server has not received."""
        before = self._store.manifest("delivered", manifest.resource_type, manifest.partition_key)
        known = before.delivered if before else None
        if self._refresh is not Refresh.MISSING or known is None or known.destination != self._client.base_url:
            return manifest.parts
        return [part for part in manifest.parts if part.name not in known.inputs]

    def _current_resources(
        self, conn: Connection, part: Part, manifest: Manifest, counts: DeliveredCounts
    ) -> Iterator[BundleEntry]:
        """Yield the resources of a part that the tables contain in the same version."""
        number = 0
        for batch in self._store.batches_with_arrivals([part]):
            lines = batch.lines
            headers = [read_header(line) for line in lines]
            rows = resources.find_versions(conn, manifest.resource_type, [header.id or "" for header in headers])
            for line, header, arrived in zip(lines, headers, batch.times(), strict=False):
                number += 1
                row = rows.get(header.id or "")
                text = header.meta.last_updated if header.meta else None
                updated = parse_stored(text, dated=batch.dated, arrival_known=arrived is not None)
                if header.id is None or row is None:
                    counts.not_in_tables += 1
                elif not row.is_version(updated, arrived, manifest.partition_key):
                    counts.superseded += 1
                else:
                    yield BundleEntry(manifest.resource_type, header.id, line, f"{part.name}:{number}")

    def _record_failures(self, journal: Journal, windows: Mapping[str, str]) -> None:
        """Record failed resources as dead letters."""

        def reject(rejected: Sequence[DeadLetter]) -> None:
            dead_letters.record_now(self._connect, self._run_id, rejected)

        buffer = DeadLetterBuffer(reject)
        for failure in journal.failures():
            buffer.add(build_dead_letter(failure, windows[failure.location.rpartition(":")[0]]))
        buffer.flush()

    def _record_delivery(
        self, manifests: Sequence[Manifest], counts: Mapping[str, DeliveredCounts], recorded_before: int
    ) -> None:
        """Record the delivered parts in the store and the delivered counts in the audit log."""
        now = datetime.now(UTC)
        delivered = [
            Manifest(
                layer="delivered",
                resource_type=manifest.resource_type,
                partition_key=manifest.partition_key,
                run_id=self._run_id,
                written_at=now,
                parts=(),
                delivered=Delivered(self._client.base_url, tuple(part.name for part in manifest.parts)),
            )
            for manifest in manifests
        ]
        rewrite_partitions(self._connect, self._store, delivered, lambda new, _current: new)
        keys: dict[str, list[str]] = {}
        for manifest in manifests:
            keys.setdefault(manifest.resource_type, []).append(manifest.partition_key)
        with self._connect() as conn, conn.transaction():
            if self._refresh is not Refresh.MISSING:
                for name, partition_keys in keys.items():
                    dead_letter_resolution.resolve_dead_letters(
                        conn, DeadLetterResolution(self._run_id, name, "deliver", partition_keys, recorded_before)
                    )
            audit_log.record(
                conn,
                *(
                    AuditRecord(
                        "export", _ACTOR, name, count=type_counts.created + type_counts.updated, run_id=self._run_id
                    )
                    for name, type_counts in counts.items()
                ),
            )


def build_dead_letter(failure: Failure, partition_key: str, *, unknown_type: str = "unknown") -> DeadLetter:
    """Return the dead letter of a resource that could not be delivered."""
    rule = f"http-{failure.status}" if failure.status else ("no-answer" if failure.id else "unusable")
    return DeadLetter(
        resource_type=failure.resource_type or unknown_type,
        resource_id=failure.id,
        stage="deliver",
        rule=rule,
        path=failure.location,
        message=failure.message,
        resource=failure.body,
        partition_key=partition_key,
    )
