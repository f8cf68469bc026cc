"""The Loader: writes resources and the rows of their views to Postgres, in the caller's transaction.

Resources are written in chunks, first to ``fhir.resource``. If no resource of a chunk is stored yet, the chunk is
copied directly. Otherwise it is upserted from a temporary table: the upsert locks the rows of the resources and returns
the ids of the resources whose version is newer than the stored version. Only the rows of these resources replace rows
in the tables of the views. Two concurrent loads of the same resources therefore have the same result as two consecutive
loads, in either order.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import islice
from typing import Any, Self

import orjson
import psycopg

from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.fhir.record import Record
from fhir_assets.fhir.views import View
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.storage.manifest import Arrival, list_times
from fhir_assets.warehouse.ops import consents, withheld_resources
from fhir_assets.warehouse.postgres.db.connections import Session, cipher_of
from fhir_assets.warehouse.postgres.tables.copy_blocks import (
    CopyBlock,
    EncodedResource,
    ResourceEncoder,
    UnstorableResource,
    ViewRows,
)
from fhir_assets.warehouse.postgres.tables.copy_chunks import EMPTY_CHUNK, CopyChunk, PartitionBlock, split_versions
from fhir_assets.warehouse.postgres.tables.encoding import NULL, escape_text
from fhir_assets.warehouse.postgres.tables.load_statements import LoadStatements

CHUNK_RESOURCES = 2_000
CHUNK_BYTES = 4 * 2**20
NO_CONSENT_GATE = ConsentGate()
"""A consent gate that withholds no resource."""

_SWITCH_INTERVAL_SECONDS = 0.0002

_COLUMN_IN_CONTEXT = re.compile(r', column "?([^":]+)"?')


@dataclass(frozen=True, slots=True)
class UnloadableResource:
    """A resource that Postgres cannot store.

    ``view`` and ``column`` name the column that does not accept a value. Both are None if the JSON of the resource
    cannot be stored.
    """

    resource_id: str
    partition_key: str
    body: bytes
    view: str | None
    column: str | None
    message: str
    arrived: datetime | None = None
    dated: bool = True
    """Whether its ``meta.lastUpdated`` is used."""


@dataclass(slots=True)
class LoadCounts:
    """The counts of resources in a load.

    ``superseded`` counts resources of which a newer version is stored or is part of the same load, ``rows`` the written
    rows by partition key and view, ``written`` the resources with these rows and ``withheld`` the resources that
    consent withholds, both by partition key.
    """

    inserted: int = 0
    updated: int = 0
    superseded: int = 0
    unloadable: int = 0
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    withheld: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _ChunkResult:
    """The counts of one chunk, and its resources that Postgres rejected."""

    inserted: int = 0
    updated: int = 0
    superseded: int = 0
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    withheld: Counter[str] = field(default_factory=Counter)
    unloadable: list[UnloadableResource] = field(default_factory=list)


_Written = tuple[int, CopyChunk, CopyChunk]
"""The number of resources that replaced an older version, the written resources, and the withheld resources."""


class Loader:
    """Loads resources of one type and their rows of ``views``.

    The caller begins and commits the transaction, so that all writes of a Loader become visible together. Loading the
    same version of a resource again, or an older version, changes nothing. ``version_order`` defines the order of
    versions. If a load has two equal versions, the one that was added last is kept.

    Used as a context manager, a Loader writes a chunk in a thread while the caller adds resources to the next chunk.
    The caller must then not use the connection between ``add`` and the following ``wait`` or ``finish``.

    With ``restore_rows``, existing rows of the views are deleted first even if ``fhir.resource`` does not have the
    resource, for instance after a row was deleted by hand. Resources that ``consent_gate`` withholds are written to
    ``ops.withheld``. With ``reencrypt``, all resources must be stored already and the caller must hold their row
    locks: the resources and their rows are encrypted again, and all other columns of ``fhir.resource`` keep their
    values. Without ``record_consents``, loaded Consents must be in ``ops.consent_records`` already.
    """

    def __init__(
        self,
        conn: Session,
        resource_type: str,
        views: Sequence[View],
        *,
        run_id: str,
        restore_rows: bool = False,
        consent_gate: ConsentGate = NO_CONSENT_GATE,
        reencrypt: bool = False,
        record_consents: bool = True,
    ) -> None:
        self._conn = conn
        self._cipher = cipher_of(conn)
        self._resource_type, self._run_id = resource_type, escape_text(run_id)
        self._params = {"run": run_id, "key_id": self._cipher.key_id}
        self._restore_rows = restore_rows
        self._views = views
        self._view_names = [view.name for view in views]
        self._pending: list[PartitionBlock] = []
        self._pending_resources = self._pending_bytes = 0
        self._counts = LoadCounts()
        self._unloadable: list[UnloadableResource] = []
        self._statements = LoadStatements(
            resource_type,
            views,
            encrypted=self._cipher.encrypts,
            consent_gate=consent_gate,
            reencrypt=reencrypt,
            record_consents=record_consents,
        )
        self._holds_decisions = False
        self._switch_interval = sys.getswitchinterval()
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[_ChunkResult] | None = None

    def __enter__(self) -> Self:
        # The writing thread needs the GIL after each full socket buffer and would wait for the switch interval, 5 ms.
        self._switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(min(self._switch_interval, _SWITCH_INTERVAL_SECONDS))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._thread is not None
        self._thread.shutdown()
        self._thread = None
        sys.setswitchinterval(self._switch_interval)

    def add(self, items: Iterable[tuple[Record, ViewRows]], partition_key: str) -> list[UnloadableResource]:
        """Encode resources of one partition and add them to the load.

        Returns the unloadable resources that were detected since the last call; they may belong to other partitions.
        Raises DatabaseUnavailable; the caller must then roll back the transaction.
        """
        encoded: list[tuple[int, EncodedResource]] = []
        lines: list[bytes] = []
        for record, rows in items:
            try:
                encoded.append((len(lines), self._encoder.encode(record, partition_key, rows)))
                lines.append(record.body)
            except UnstorableResource as error:
                self._add_unloadable(
                    UnloadableResource(
                        record.id,
                        partition_key,
                        record.body,
                        error.view,
                        error.column,
                        error.message,
                        record.arrived,
                        record.dated,
                    )
                )
        return self.add_block(CopyBlock.build(encoded, len(self._view_names)), lines, partition_key)

    def add_block(
        self, block: CopyBlock, lines: Sequence[bytes], partition_key: str, arrivals: Sequence[Arrival] = ()
    ) -> list[UnloadableResource]:
        """Add resources that are encoded already. ``lines`` is their batch as received, ``arrivals`` the times of its
        lines. See ``add``.
        """
        self._pending.append(PartitionBlock(block, partition_key, lines, arrivals))
        self._pending_resources += len(block)
        self._pending_bytes += block.size
        if self._pending_resources >= CHUNK_RESOURCES or self._pending_bytes >= CHUNK_BYTES:
            self._flush()
        return self.take_unloadable()

    def wait(self) -> None:
        """Wait until no chunk is being written. Raises DatabaseUnavailable if the last chunk could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self._add_counts(writing.result())

    def finish(self) -> LoadCounts:
        """Write everything that was added, and return the counts of the load.

        Call ``take_unloadable`` afterwards: the last chunk may contain unloadable resources. Raises
        DatabaseUnavailable.
        """
        self._flush()
        self.wait()
        return self._counts

    def take_unloadable(self) -> list[UnloadableResource]:
        """Return the unloadable resources that were detected since the last call, and remove them from the Loader."""
        unloadable, self._unloadable = self._unloadable, []
        return unloadable

    @cached_property
    def _encoder(self) -> ResourceEncoder:
        return ResourceEncoder(self._views, self._cipher, self._conn.source)

    def _add_unloadable(self, unloadable: UnloadableResource) -> None:
        self._unloadable.append(unloadable)
        self._counts.unloadable += 1

    def _flush(self) -> None:
        blocks, self._pending = self._pending, []
        resources, self._pending_resources, self._pending_bytes = self._pending_resources, 0, 0
        chunk = CopyChunk(blocks)
        if len(set(chunk.ids)) == resources:
            self._write_later(chunk)
            return
        chunks = [CopyChunk(blocks_of_round) for blocks_of_round in split_versions(blocks)]
        self._counts.superseded += resources - sum(map(len, chunks))
        for chunk in chunks:
            self._write_later(chunk)

    def _write_later(self, chunk: CopyChunk) -> None:
        """Write a chunk, in the thread if there is one, after the previous chunk."""
        if chunk:
            # Join the texts before waiting, while Postgres still writes the previous chunk.
            _ = chunk.resource_lines, chunk.view_lines
        self.wait()
        if not chunk:
            return
        if self._thread is not None:
            self._writing = self._thread.submit(self._write, chunk)
        else:
            self._add_counts(self._write(chunk))

    def _add_counts(self, result: _ChunkResult) -> None:
        self._counts.inserted += result.inserted
        self._counts.updated += result.updated
        self._counts.superseded += result.superseded
        self._counts.rows.update(result.rows)
        self._counts.written.update(result.written)
        self._counts.withheld.update(result.withheld)
        for unloadable in result.unloadable:
            self._add_unloadable(unloadable)

    def _write(self, chunk: CopyChunk) -> _ChunkResult:
        result = _ChunkResult()
        try:
            # Begin the transaction if the caller has not executed a statement yet. Without it, ``transaction()`` below
            # would be the outermost transaction block and commit the chunk.
            self._conn.execute("SELECT")
            if self._statements.consent_gate and not self._holds_decisions:
                consents.lock_decisions_for_load(self._conn)
                self._holds_decisions = True
            self._write_or_split(chunk, result)
        except psycopg.errors.DeadlockDetected:
            raise DatabaseUnavailable(
                "Two loads of the same resources were in a deadlock, and Postgres cancelled this load: run it again"
            ) from None
        except psycopg.errors.DiskFull:
            raise DatabaseUnavailable("The disk of Postgres is full: free space, then run the load again") from None
        except psycopg.OperationalError as error:
            raise DatabaseUnavailable(
                f"Postgres became unavailable during the load ({type(error).__name__}): the load is rolled back; "
                "run it again"
            ) from None
        return result

    def _write_or_split(self, chunk: CopyChunk, result: _ChunkResult) -> None:
        """Write a chunk. If Postgres rejects it, split it in halves until the rejected resources are isolated."""
        try:
            try:
                with self._conn.transaction():
                    updated, written, withheld = self._copy_new(chunk) or self._merge(
                        chunk, restore_rows=self._restore_rows
                    )
            except psycopg.errors.UniqueViolation:
                # A table of a view has rows of a resource that fhir.resource does not have.
                with self._conn.transaction():
                    updated, written, withheld = self._merge(chunk, restore_rows=True)
        except (psycopg.DataError, psycopg.errors.ProgramLimitExceeded, psycopg.errors.StatementTooComplex) as error:
            if len(chunk) > 1:
                for half in chunk.split():
                    self._write_or_split(half, result)
                return
            view, column = self._find_column(error)
            [(block, partition_key, lines, arrivals)] = chunk.blocks
            position = block.line_numbers[0]
            arrived = next(islice(list_times(arrivals), position, None))
            dated = bool(block.dated[0])
            message = f"Postgres cannot store the resource ({type(error).__name__}): correct the resource or the view"
            result.unloadable.append(
                UnloadableResource(block.ids[0], partition_key, lines[position], view, column, message, arrived, dated)
            )
            return
        result.updated += updated
        result.inserted += len(written) - updated
        result.superseded += len(chunk) - len(written) - len(withheld)
        for partition_block in withheld.blocks:
            result.withheld[partition_block.partition_key] += len(partition_block.block)
        for partition_block in written.blocks:
            key, block = partition_block.partition_key, partition_block.block
            result.written[key] += len(block)
            for view_name, joined in zip(self._view_names, block.view_lines, strict=True):
                result.rows[key, view_name] += joined.text.count(b"\n")

    def _copy_new(self, chunk: CopyChunk) -> _Written | None:
        """Copy a chunk directly. Return None and write nothing if one of its resources is stored already."""
        statements = self._statements
        if self._restore_rows or not statements.may_copy_new:
            return None
        with self._conn.cursor() as cursor:
            ids = orjson.dumps(chunk.ids).decode()
            stored, now = cursor.execute(statements.count_stored, [ids]).fetchone() or (0, "")
            if stored:
                return None
            columns = (self._resource_type, self._run_id, str(now), self._cipher.key_id or NULL, "")
            start = "\t".join(columns).encode()
            try:
                with self._conn.transaction(), cursor.copy(statements.copy_new) as copy:
                    copy.write(start + chunk.resource_lines[:-1].replace(b"\n", b"\n" + start) + b"\n")
            except (psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected):
                # A concurrent load has written one of the resources since the count.
                return None
            self._copy_rows(cursor, chunk)
        return 0, chunk, EMPTY_CHUNK

    def _merge(self, chunk: CopyChunk, *, restore_rows: bool) -> _Written:
        """Write a chunk through the stage, so that the newest version of each resource is kept."""
        statements = self._statements
        with self._conn.cursor() as cursor:
            cursor.execute(statements.create_stage)
            with cursor.copy(statements.copy_to_stage) as copy:
                copy.write(chunk.resource_lines)
            withheld, removed = self._withhold(cursor)
            is_new: dict[str, bool] = dict(cursor.execute(statements.merge, self._params).fetchall())
            cursor.execute(statements.clear_stage)
            written = chunk.select_ids(is_new)
            updated = [resource_id for resource_id, new in is_new.items() if not new]
            outdated = (list(is_new) if restore_rows else updated) + removed
            if outdated:
                for view in statements.views:
                    cursor.execute(view.delete, [outdated])
            self._copy_rows(cursor, written)
        return len(updated), written, chunk.select_ids(withheld)

    def _copy_rows(self, cursor: psycopg.Cursor[Any], chunk: CopyChunk) -> None:
        for view, text in zip(self._statements.views, chunk.view_lines, strict=bool(chunk)):
            if text:
                with cursor.copy(view.copy) as copy:
                    copy.write(text)

    def _withhold(self, cursor: psycopg.Cursor[Any]) -> tuple[frozenset[str], list[str]]:
        """Record staged Consents and withhold resources.

        Returns the ids of the withheld resources, and the ids of the resources that were removed from the table.
        """
        consent_gate = self._statements.consent_gate
        for statement in consent_gate.resolve if consent_gate else ():
            cursor.execute(statement)
        for statement in self._statements.record_consents:
            cursor.execute(statement, self._params)
        if consent_gate is None:
            return frozenset(), []
        withheld: list[str] = []
        for statement in consent_gate.withhold:
            withheld += [resource_id for (resource_id,) in cursor.execute(statement, self._params)]
        cursor.execute(consent_gate.remove_superseded)
        released: list[tuple[str, list[str] | None]] = cursor.execute(consent_gate.remove_released).fetchall()
        removed: list[str] = []
        if withheld:
            removed = [resource_id for (resource_id,) in cursor.execute(consent_gate.remove_loaded, {"ids": withheld})]
            released += cursor.execute(consent_gate.remove_outdated, {"ids": withheld}).fetchall()
        withheld_resources.mark_referring(self._conn, self._resource_type, released)
        return frozenset(withheld), removed

    def _find_column(self, error: psycopg.Error) -> tuple[str | None, str | None]:
        """Return the view and the column that the error names. The error's message may quote values and is not used."""
        context = error.diag.context or ""
        column = _COLUMN_IN_CONTEXT.search(context)
        table = error.diag.table_name or next(
            (name for name in self._view_names if context.startswith(f"COPY {name},")), None
        )
        return (table if table in self._view_names else None), (column[1] if column else error.diag.column_name)
