"""Removes resources from the tables that a server no longer has, after its windows were read again from their start.

This is the only way to find deletions at a server without a history, or with FHIR_DELETES off. A resource is removed
only if a read by its id confirms the deletion; the server may have other reasons not to return it. Resources that came
through another channel than the source (landing zone, HTTP, CSV) are kept.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from fhir_assets.fhir.record import Deletion, read_header
from fhir_assets.fhir.search.existence import MAX_KNOWN_IDS
from fhir_assets.notices import Notice, Notices
from fhir_assets.pipeline.deletions.deletion_log import DeletionLog
from fhir_assets.pipeline.fetch.step import RawUpdate
from fhir_assets.storage.manifest import Part
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.postgres.db.connections import OpenSession
from fhir_assets.warehouse.postgres.queries import vanished

MAX_READS = 50_000
"""How many resources of a type are looked up by id in one run."""

MISSING_REFERENCES = "missing:"
"""The origins of resources that were read from the source itself because other resources refer to them."""


class ReadableById(Protocol):
    """A server whose resources can be read by id."""

    def find_gone(self, resource_type: str, ids: Sequence[str], known_ids: Sequence[str]) -> Iterator[Deletion]:
        """Yield the deletions of those ids that the server no longer has."""
        ...


class VanishedStep:
    """Removes the resources that a server no longer has from the tables, for windows that were read again."""

    def __init__(
        self, connect: OpenSession, store: Store, deletion_log: DeletionLog, server: ReadableById, *, run_id: str
    ) -> None:
        self._connect = connect
        self._store = store
        self._deletion_log = deletion_log
        self._server = server
        self._run_id = run_id
        self._notices = Notices()

    def run(self, update: RawUpdate) -> int:
        """Remove what the server no longer has in the windows that the update read from their start.

        Return the number of removed resources. Raises ServerUnavailable, StoreError or DatabaseUnavailable.
        """
        name, keys = update.resource_type, update.refetched_keys
        known_ids: list[str] = []
        with self._connect() as conn:
            if not keys or not vanished.has_resources(conn, name, keys):
                return 0
            ids = vanished.find_vanished(
                conn, name, keys, self._read_returned_ids(update, known_ids), limit=MAX_READS + 1
            )
            conn.commit()
        if len(ids) > MAX_READS:
            self._notices.add(
                "error",
                "deletions-unconfirmed",
                f"more than {MAX_READS} {name} resources in the tables are not among those that the server returns: "
                f"{MAX_READS} of them are looked up by id in one run, run the full refresh again for the others",
                name,
            )
        if not ids:
            return 0
        gone = self._server.find_gone(name, ids[:MAX_READS], known_ids)
        return self._deletion_log.record(gone, run_id=self._run_id).deleted[name]

    def drain_notices(self) -> tuple[Notice, ...]:
        """Return the notices since the last call."""
        return self._notices.drain()

    def _read_returned_ids(self, update: RawUpdate, known_ids: list[str]) -> Iterator[str]:
        """Yield the ids that the source returned, then those that came through other channels.

        The first ids that the source returned are appended to ``known_ids``.
        """
        keys = set(update.refetched_keys)
        returned = [part for m in update.manifests if m.partition_key in keys for part in m.parts if not part.origin]
        for resource_id in self._read_ids(returned):
            if len(known_ids) < MAX_KNOWN_IDS:
                known_ids.append(resource_id)
            yield resource_id
        current = self._store.manifests("raw", update.resource_type, list(keys))
        yield from self._read_ids([part for m in current for part in m.parts if _is_of_another_channel(part)])

    def _read_ids(self, parts: Sequence[Part]) -> Iterator[str]:
        for batch in self._store.batches(parts):
            for line in batch:
                resource_id = read_header(line).id
                if resource_id:
                    yield resource_id


def _is_of_another_channel(part: Part) -> bool:
    return part.origin is not None and not part.origin.startswith(MISSING_REFERENCES)
