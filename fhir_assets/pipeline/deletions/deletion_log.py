"""Deletions are data as resources are: they are kept in the store, layer ``deleted``, before the tables hear of them.

So tables that are built anew from the store end without what was deleted, though raw has it still. A type's deletions
are one partition; ``ops.deletion_parts`` says which of its parts a database knows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from itertools import islice

import msgspec

from fhir_assets.catalog import BY_NAME
from fhir_assets.fhir.record import Deletion
from fhir_assets.pipeline.partition_commit import rewrite_partitions
from fhir_assets.storage.manifest import Manifest, Part
from fhir_assets.storage.part_writer import PartWriter, lines_of
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.postgres.db.connections import Connection, Session
from fhir_assets.warehouse.postgres.tables import deletions as deletes
from fhir_assets.warehouse.postgres.tables.deletions import Deleted

LAYER = "deleted"
PARTITION = "all"
MANY_PARTS = 64
"""From so many small parts on they are joined into one."""

_SMALL_BYTES = 1 << 20
_AT_ONCE = 5000


class _Line(msgspec.Struct, omit_defaults=True):
    """A deletion in the store."""

    id: str
    deleted: datetime
    versionId: str | None = None  # noqa: N815


_decoder = msgspec.json.Decoder(_Line)


class DeletionLog:
    """Keeps deletions in ``store`` and applies them to the tables behind ``connect``."""

    def __init__(
        self,
        store: Store,
        connect: Callable[[], Session],
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._connect = connect
        self._now = now

    def record(self, deletions: Iterable[Deletion], *, run_id: str, actor: str = "pipeline") -> Deleted:
        """Keep deletions, streamed, then apply them; what cannot be applied now, the next load of the type does.

        Types that the catalog does not have are left out: there is nothing of them anywhere. Raises StoreError,
        DatabaseUnavailable, and what ``deletions`` raises; nothing is kept then.
        """
        total = Deleted()
        for name in self._keep(deletions, run_id):
            with closing(self._connect()) as conn:
                total.update(self.apply_pending(conn, name, run_id=run_id, actor=actor))
        return total

    def apply_pending(self, conn: Connection, resource_type: str, *, run_id: str, actor: str = "pipeline") -> Deleted:
        """Apply those deletions of a type that the store has and the database does not know. Commits ``conn``."""
        total = Deleted()
        manifest = self._store.manifest(LAYER, resource_type, PARTITION)
        if manifest is None:
            return total
        new = set(deletes.unknown_parts(conn, [part.name for part in manifest.parts]))
        conn.commit()
        for part in manifest.parts:
            if part.name not in new:
                continue
            rest = self._deletions(resource_type, part)
            while chunk := list(islice(rest, _AT_ONCE)):
                total.update(deletes.bury(self._connect, chunk, run_id=run_id, actor=actor))
            deletes.know_part(conn, part.name)
            conn.commit()
        return total

    def _keep(self, deletions: Iterable[Deletion], run_id: str) -> list[str]:
        """Put deletions into the store; returns their types."""
        with PartWriter(self._store, LAYER) as writer:
            for each in deletions:
                if each.resource_type in BY_NAME:
                    line = msgspec.json.encode(_Line(each.id, each.at, each.version_id))
                    writer.add(each.resource_type, PARTITION, line, each.at)
            parts = {name: of_type for (name, _), of_type in writer.finish().items()}
        mine = [self._manifest(name, run_id, of_type) for name, of_type in sorted(parts.items())]
        for manifest in rewrite_partitions(self._connect, self._store, mine, _added):
            if sum(part.bytes < _SMALL_BYTES for part in manifest.parts) >= MANY_PARTS:
                self._join(manifest, run_id)
        return sorted(parts)

    def _join(self, manifest: Manifest, run_id: str) -> None:
        """Many small parts become one: each costs a call to read and a place in the manifest."""
        name = manifest.resource_type
        small = [part for part in manifest.parts if part.bytes < _SMALL_BYTES]
        with PartWriter(self._store, LAYER) as writer:
            for line in lines_of(self._store.batches(small)):
                writer.add(name, PARTITION, line, _decoder.decode(line).deleted)
            joined = writer.finish()[name, PARTITION]
        gone = {part.name for part in small}

        def merge(mine: Manifest, now: Manifest | None) -> Manifest:
            there = now.parts if now else ()
            if not gone.issubset(part.name for part in there):
                return now or mine  # somebody else joined them
            rest = tuple(part for part in there if part.name not in gone)
            return msgspec.structs.replace(mine, parts=(*rest, *mine.parts))

        rewrite_partitions(self._connect, self._store, [self._manifest(name, run_id, joined)], merge)

    def _manifest(self, resource_type: str, run_id: str, parts: Sequence[Part]) -> Manifest:
        return Manifest(LAYER, resource_type, PARTITION, run_id, self._now(), tuple(parts))

    def _deletions(self, resource_type: str, part: Part) -> Iterator[Deletion]:
        for line in lines_of(self._store.batches([part])):
            found = _decoder.decode(line)
            yield Deletion(resource_type, found.id, found.deleted, found.versionId)


def _added(mine: Manifest, now: Manifest | None) -> Manifest:
    return msgspec.structs.replace(mine, parts=(*now.parts, *mine.parts)) if now else mine
