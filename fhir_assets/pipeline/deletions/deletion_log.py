"""The log of deletions: layer ``deleted`` of the store, written before the deletions are applied to the tables.

Tables that are rebuilt from the store therefore lack the deleted resources, although the raw layer still has them.
The deletions of one resource type form one partition. ``ops.deletion_parts`` lists the parts that a database has
applied.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice

import msgspec

from fhir_assets.catalog import BY_NAME
from fhir_assets.fhir.record import Deletion, is_credible
from fhir_assets.pipeline.partition_commit import rewrite_partitions
from fhir_assets.storage.manifest import Manifest, Part
from fhir_assets.storage.part_writer import PartWriter, flatten_batches
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession
from fhir_assets.warehouse.postgres.tables import deletions as deletion_tables
from fhir_assets.warehouse.postgres.tables.deletions import DeletionCounts

LAYER = "deleted"
PARTITION = "all"
MAX_SMALL_PARTS = 64
"""A partition with this many small parts is compacted: the small parts are merged into one."""

_SMALL_PART_BYTES = 1 << 20
_DELETIONS_PER_BATCH = 5000
_SEVERAL_ORIGINS = "received"
"""The origin of a part that is merged from parts of several origins."""


class _Line(msgspec.Struct, rename="camel", omit_defaults=True):
    """One deletion as a line of NDJSON in the store."""

    id: str
    deleted: datetime
    version_id: str | None = None


_decoder = msgspec.json.Decoder(_Line)


class DeletionLog:
    """Records deletions in a store and applies them to the tables of a database."""

    def __init__(
        self,
        store: Store,
        connect: OpenSession,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._connect = connect
        self._now = now

    def record(
        self, deletions: Iterable[Deletion], *, run_id: str, actor: str = "pipeline", origin: str | None = None
    ) -> DeletionCounts:
        """Write deletions to the store as a stream, then apply them to the tables. Return the counts of deletions.

        ``origin`` identifies the input that contains the deletions, if they do not come from the configured source.

        Deletions that are stored but could not be applied are applied by the next load of the type. Types that are not
        in the catalog are ignored.

        Raises StoreError or DatabaseUnavailable. If iterating over ``deletions`` raises an error, it
        is raised and nothing is stored.
        """
        total = DeletionCounts()
        for name in self._store_deletions(deletions, run_id, origin):
            with self._connect() as conn:
                total.update(self.apply_pending(conn, name, run_id=run_id, actor=actor))
        return total

    def apply_pending(
        self, conn: Connection, resource_type: str, *, run_id: str, actor: str = "pipeline"
    ) -> DeletionCounts:
        """Apply the deletions of a type that are in the store and not yet in the database. Commits ``conn``."""
        total = DeletionCounts()
        manifest = self._store.manifest(LAYER, resource_type, PARTITION)
        if manifest is None:
            return total
        unapplied = set(deletion_tables.find_unapplied_parts(conn, [part.name for part in manifest.parts]))
        conn.commit()
        for part in manifest.parts:
            if part.name not in unapplied:
                continue
            deletions = self._read_deletions(resource_type, part)
            while chunk := list(islice(deletions, _DELETIONS_PER_BATCH)):
                total.update(deletion_tables.apply_in_transaction(self._connect, chunk, run_id=run_id, actor=actor))
            deletion_tables.mark_part_applied(conn, part.name)
            conn.commit()
        return total

    def _store_deletions(self, deletions: Iterable[Deletion], run_id: str, origin: str | None) -> list[str]:
        """Write deletions to the store and return their resource types."""
        now = self._now()
        with PartWriter(self._store, LAYER) as writer:
            for deletion in deletions:
                if deletion.resource_type in BY_NAME:
                    # A deletion in the future would remove every later version, too.
                    at = deletion.at if is_credible(deletion.at, now) else now
                    line = msgspec.json.encode(_Line(deletion.id, at, deletion.version_id))
                    writer.add(deletion.resource_type, PARTITION, line, at)
            parts_by_type = {
                name: [msgspec.structs.replace(part, origin=origin) for part in parts]
                for (name, _), parts in writer.finish().items()
            }
        manifests = [self._build_manifest(name, run_id, parts) for name, parts in sorted(parts_by_type.items())]
        for manifest in rewrite_partitions(self._connect, self._store, manifests, _append_parts):
            small = [part for part in manifest.parts if part.bytes < _SMALL_PART_BYTES]
            if len(small) >= MAX_SMALL_PARTS:
                self._compact(manifest, run_id, [part for part in small if part.origin is None], None)
                self._compact(manifest, run_id, [part for part in small if part.origin is not None], _SEVERAL_ORIGINS)
        return sorted(parts_by_type)

    def _compact(self, manifest: Manifest, run_id: str, small: Sequence[Part], origin: str | None) -> None:
        """Merge small parts into one of ``origin``, because every part costs a read and an entry in the manifest."""
        if len(small) < 2:
            return
        name = manifest.resource_type
        with PartWriter(self._store, LAYER) as writer:
            for line in flatten_batches(self._store.batches(small)):
                writer.add(name, PARTITION, line, _decoder.decode(line).deleted)
            merged = [msgspec.structs.replace(part, origin=origin) for part in writer.finish()[name, PARTITION]]
        small_names = {part.name for part in small}

        def merge(new: Manifest, current: Manifest | None) -> Manifest:
            parts = current.parts if current else ()
            if not small_names.issubset(part.name for part in parts):
                return current or new  # another process compacted the partition
            kept = tuple(part for part in parts if part.name not in small_names)
            return msgspec.structs.replace(new, parts=(*kept, *new.parts))

        rewrite_partitions(self._connect, self._store, [self._build_manifest(name, run_id, merged)], merge)

    def _build_manifest(self, resource_type: str, run_id: str, parts: Sequence[Part]) -> Manifest:
        return Manifest(LAYER, resource_type, PARTITION, run_id, self._now(), tuple(parts))

    def _read_deletions(self, resource_type: str, part: Part) -> Iterator[Deletion]:
        for line in flatten_batches(self._store.batches([part])):
            deletion = _decoder.decode(line)
            yield Deletion(resource_type, deletion.id, deletion.deleted, deletion.version_id)


def _append_parts(new: Manifest, current: Manifest | None) -> Manifest:
    return msgspec.structs.replace(new, parts=(*current.parts, *new.parts)) if current else new
