"""Resources and the rows of their views into the tables: COPY, newest version wins, all in the caller's transaction.

A chunk of resources goes into ``fhir.resource`` first. Of new ones it is copied straight into it; one with a resource
that is there is upserted, which takes the rows' locks and says which won against what is stored. Only the winners' rows
replace those of the views. So two loads of the same resources at once end as if one had come after the other, whatever
their order.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import orjson
import psycopg

from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.fhir.record import Record
from fhir_assets.fhir.views import View
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.warehouse.ops import consents
from fhir_assets.warehouse.postgres.db.connections import Session, cipher_of
from fhir_assets.warehouse.postgres.tables.copy_blocks import (
    CopyBlock,
    Prepared,
    ResourceEncoder,
    UnstorableResource,
    ViewRows,
)
from fhir_assets.warehouse.postgres.tables.copy_chunks import NOTHING, Chunk, Piece, newest
from fhir_assets.warehouse.postgres.tables.encoding import NULL, escape_text
from fhir_assets.warehouse.postgres.tables.load_statements import LoadStatements

CHUNK_RESOURCES = 2_000
CHUNK_BYTES = 4 * 2**20
NO_CONSENT_GATE = ConsentGate()
"""Nothing is withheld."""

_SWITCH_SECONDS = 0.0002

_COLUMN = re.compile(r', column "?([^":]+)"?')


@dataclass(frozen=True, slots=True)
class UnloadableResource:
    """A resource that Postgres cannot hold; ``view`` and ``column`` are None if the fault is in its JSON as such."""

    resource_id: str
    partition_key: str
    body: bytes
    view: str | None
    column: str | None
    message: str


@dataclass(slots=True)
class LoadCounts:
    """What a load did. ``superseded`` resources lost to a newer version, stored or in the same load; ``rows`` are
    those written, by view; ``withheld`` those that consent keeps out, by partition key.
    """

    inserted: int = 0
    updated: int = 0
    superseded: int = 0
    unloadable: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    withheld: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Outcome:
    """What came of one chunk."""

    inserted: int = 0
    updated: int = 0
    superseded: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    withheld: Counter[str] = field(default_factory=Counter)
    refused: list[UnloadableResource] = field(default_factory=list)


_Written = tuple[int, Chunk, Chunk]
"""Of a chunk: how many resources were there before, those that won, and those that are withheld."""


class Loader:
    """Loads resources of one type and their rows of ``views``. The caller opens and commits the transaction:
    everything that one Loader writes is seen together or not at all.

    A second load of a resource, or of an older version of it, changes nothing. Of versions of the same time the one
    with the greater numeric ``versionId`` is newer, and of equals the one that came last.

    Used as a context manager it writes one chunk in a thread while it takes the next. The connection is its own
    then, from the first ``add`` on; the caller may use it after ``wait`` or ``finish``, until the next ``add``.

    With ``mend`` rows are replaced even of resources that ``fhir.resource`` lacks, as after a deletion by hand.
    What ``gate`` withholds goes into ``ops.withheld`` instead. With ``reseal`` the resources are those that are stored,
    of which the caller holds the row locks: they and their rows are written anew, and nothing else of them changes.
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
    ) -> None:
        self._conn = conn
        self._resource_type, self._run_id = resource_type, escape_text(run_id)
        self._params = {"run": run_id, "key_id": cipher_of(conn).key_id}
        self._restore_rows = restore_rows
        self._definitions = views
        self._views = [view.name for view in views]
        self._cipher = cipher_of(conn)
        self._pieces: list[Piece] = []
        self._held = self._bytes = 0
        self._counts = LoadCounts(rows=Counter({view.name: 0 for view in views}))
        self._unloadable: list[UnloadableResource] = []
        self._statements = LoadStatements(
            resource_type, views, encrypted=self._cipher.on, consent_gate=consent_gate, reencrypt=reencrypt
        )
        self._decided = False
        self._interval = sys.getswitchinterval()
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[_Outcome] | None = None

    def __enter__(self) -> Self:
        # At each filled socket buffer the writer asks for the interpreter again, and would wait 5 ms for its turn.
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(min(self._interval, _SWITCH_SECONDS))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._thread is not None
        self._thread.shutdown()
        self._thread = None
        sys.setswitchinterval(self._interval)

    def add(self, items: Iterable[tuple[Record, ViewRows]], partition_key: str) -> list[UnloadableResource]:
        """Prepare and take resources of one partition. Returns those found unloadable since the last call (the
        partition of each is in it). Raises DatabaseUnavailable; the transaction is then lost.
        """
        prepared: list[tuple[int, Prepared]] = []
        lines: list[bytes] = []
        for record, rows in items:
            try:
                prepared.append((len(lines), self._encoder.prepare(record, partition_key, rows)))
                lines.append(record.body)
            except UnstorableResource as unfit:
                self._refused(
                    UnloadableResource(record.id, partition_key, record.body, unfit.view, unfit.column, unfit.message)
                )
        return self.add_block(CopyBlock.of(prepared, len(self._views)), lines, partition_key)

    def add_block(self, block: CopyBlock, lines: Sequence[bytes], partition_key: str) -> list[UnloadableResource]:
        """As ``add``, of resources that were prepared elsewhere, from these lines, as they were received."""
        self._pieces.append(Piece(block, partition_key, lines))
        self._held += len(block)
        self._bytes += block.size
        if self._held >= CHUNK_RESOURCES or self._bytes >= CHUNK_BYTES:
            self._flush()
        return self._drain()

    def wait(self) -> None:
        """Return when nothing is being written. Raises DatabaseUnavailable if the last chunk could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self._account(writing.result())

    def finish(self) -> LoadCounts:
        """Write what is held, all of it. Unloadable resources that only now turned up are in ``late``."""
        self._flush()
        self.wait()
        return self._counts

    def take_unloadable(self) -> list[UnloadableResource]:
        """The unloadable resources that ``finish`` found."""
        return self._drain()

    @cached_property
    def _encoder(self) -> ResourceEncoder:
        return ResourceEncoder(self._definitions, self._cipher)

    def _drain(self) -> list[UnloadableResource]:
        found, self._unloadable = self._unloadable, []
        return found

    def _refused(self, unloadable: UnloadableResource) -> None:
        self._unloadable.append(unloadable)
        self._counts.unloadable += 1

    def _flush(self) -> None:
        pieces, self._pieces = self._pieces, []
        held, self._held, self._bytes = self._held, 0, 0
        chunk = Chunk(pieces)
        if len(set(chunk.ids)) < held:
            chunk = Chunk(newest(pieces))
            self._counts.superseded += held - len(chunk)
        if chunk:
            # Put together before the wait: Postgres is busy meanwhile.
            _ = chunk.heads, chunk.rows
        self.wait()
        if not chunk:
            return
        if self._thread is not None:
            self._writing = self._thread.submit(self._write, chunk)
        else:
            self._account(self._write(chunk))

    def _account(self, outcome: _Outcome) -> None:
        self._counts.inserted += outcome.inserted
        self._counts.updated += outcome.updated
        self._counts.superseded += outcome.superseded
        self._counts.rows.update(outcome.rows)
        self._counts.withheld.update(outcome.withheld)
        for unloadable in outcome.refused:
            self._refused(unloadable)

    def _write(self, chunk: Chunk) -> _Outcome:
        outcome = _Outcome()
        try:
            # Begins the caller's transaction, if nothing has: a chunk alone must not be one.
            self._conn.execute("SELECT")
            if self._statements.consent_gate and not self._decided:
                consents.lock_decisions_for_load(self._conn)
                self._decided = True
            self._write_or_halve(chunk, outcome)
        except psycopg.errors.DeadlockDetected:
            raise DatabaseUnavailable(
                "Two loads of the same resources crossed, and Postgres gave one of them up: run it again"
            ) from None
        except psycopg.errors.DiskFull:
            raise DatabaseUnavailable("Postgres's disk is full: make room, then run it again") from None
        except psycopg.OperationalError as error:
            raise DatabaseUnavailable(
                f"Postgres went away during the load ({type(error).__name__}): nothing of it is kept; run it again"
            ) from None
        return outcome

    def _write_or_halve(self, chunk: Chunk, outcome: _Outcome) -> None:
        """Write a chunk, or what Postgres takes of it: the rare resource that it refuses is found by halving."""
        try:
            with self._conn.transaction():
                updated, winners, withheld = self._insert(chunk) or self._merge(chunk)
        except (psycopg.DataError, psycopg.errors.ProgramLimitExceeded, psycopg.errors.StatementTooComplex) as error:
            if len(chunk) > 1:
                for half in chunk.halves():
                    self._write_or_halve(half, outcome)
                return
            view, column = self._place(error)
            [(block, partition_key, lines)] = chunk.pieces
            body = lines[block.places[0]]
            outcome.refused.append(UnloadableResource(block.ids[0], partition_key, body, view, column, _said(error)))
            return
        outcome.updated += updated
        outcome.inserted += len(winners) - updated
        outcome.superseded += len(chunk) - len(winners) - len(withheld)
        for piece in withheld.pieces:
            outcome.withheld[piece.partition_key] += len(piece.block)
        for view, text in zip(self._views, winners.rows, strict=bool(winners)):
            outcome.rows[view] += text.count(b"\n")

    def _insert(self, chunk: Chunk) -> _Written | None:
        """Copy a chunk of new resources to where they belong; None, and nothing written, if one of them is there."""
        statements = self._statements
        if self._restore_rows or not statements.may_insert:
            return None
        with self._conn.cursor() as cursor:
            known, now = cursor.execute(statements.known, [orjson.dumps(chunk.ids).decode()]).fetchone() or (0, "")
            if known:
                return None
            facts = (self._resource_type, self._run_id, str(now), self._cipher.key_id or NULL, "")
            start = "\t".join(facts).encode()
            try:
                with self._conn.transaction(), cursor.copy(statements.copy_new) as copy:
                    copy.write(start + chunk.heads[:-1].replace(b"\n", b"\n" + start) + b"\n")
            except (psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected):
                # Another load brought one of them in this moment.
                return None
            self._copy_rows(cursor, chunk)
        return 0, chunk, NOTHING

    def _merge(self, chunk: Chunk) -> _Written:
        """Put a chunk in by way of a table of its own, so that the newest versions win."""
        statements = self._statements
        with self._conn.cursor() as cursor:
            cursor.execute(statements.stage)
            with cursor.copy(statements.copy_stage) as copy:
                copy.write(chunk.heads)
            gone, taken_back = self._withhold(cursor)
            inserted: dict[str, bool] = dict(cursor.execute(statements.upsert, self._params).fetchall())
            cursor.execute(statements.clear_stage)
            winners = chunk.only(inserted)
            updated = [key for key, new in inserted.items() if not new]
            stale = (list(inserted) if self._restore_rows else updated) + taken_back
            if stale:
                for delete, _ in statements.views:
                    cursor.execute(delete, [stale])
            self._copy_rows(cursor, winners)
        return len(updated), winners, chunk.only(gone)

    def _copy_rows(self, cursor: psycopg.Cursor[Any], winners: Chunk) -> None:
        for (_, copy_rows), text in zip(self._statements.views, winners.rows, strict=bool(winners)):
            if text:
                with cursor.copy(copy_rows) as copy:
                    copy.write(text)

    def _withhold(self, cursor: psycopg.Cursor[Any]) -> tuple[frozenset[str], list[str]]:
        """Note what Consents say; then the ids in the stage that are withheld, and those of them that had rows."""
        for statement in self._statements.consents:
            cursor.execute(statement, self._params)
        consent_gate = self._statements.consent_gate
        if consent_gate is None:
            return frozenset(), []
        gone = [key for (key,) in cursor.execute(consent_gate.withhold, self._params)]
        cursor.execute(consent_gate.remove_superseded)
        cursor.execute(consent_gate.remove_released)
        taken_back: list[str] = []
        if gone:
            taken_back = [key for (key,) in cursor.execute(consent_gate.remove_loaded, {"ids": gone})]
            cursor.execute(consent_gate.remove_outdated, {"ids": gone})
        return frozenset(gone), taken_back

    def _place(self, error: psycopg.Error) -> tuple[str | None, str | None]:
        """View and column that Postgres names; its message is not passed on, since it quotes values."""
        named = _COLUMN.search(error.diag.context or "")
        table = error.diag.table_name or next(
            (view for view in self._views if (error.diag.context or "").startswith(f"COPY {view},")), None
        )
        return (table if table in self._views else None), (named[1] if named else error.diag.column_name)


def _said(error: psycopg.Error) -> str:
    return f"Postgres does not store it ({type(error).__name__}): correct the resource, or the view's column"
