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
from typing import Any, NamedTuple, Self

import psycopg

from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.fhir.record import Record
from fhir_assets.fhir.views import View
from fhir_assets.privacy.consent import Gate
from fhir_assets.warehouse import consents
from fhir_assets.warehouse.database import Connection, sealing_of
from fhir_assets.warehouse.encode import NULL, plain_text
from fhir_assets.warehouse.load_statements import LoadStatements
from fhir_assets.warehouse.prepared import Preparation, Prepared, Unfit, ViewRows

CHUNK_RESOURCES = 2_000
CHUNK_BYTES = 4 * 2**20
OPEN = Gate()
"""Nothing is withheld."""

_SWITCH_SECONDS = 0.0002

_COLUMN = re.compile(r', column "?([^":]+)"?')


@dataclass(frozen=True, slots=True)
class Unloadable:
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


class _Held(NamedTuple):
    """A resource of the chunk, and what a dead letter would need."""

    prepared: Prepared
    partition_key: str
    body: bytes


@dataclass(slots=True)
class _Outcome:
    """What came of one chunk."""

    inserted: int = 0
    updated: int = 0
    superseded: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    withheld: Counter[str] = field(default_factory=Counter)
    refused: list[Unloadable] = field(default_factory=list)


_Written = tuple[int, list[_Held], list[_Held]]
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
        conn: Connection,
        resource_type: str,
        views: Sequence[View],
        *,
        run_id: str,
        mend: bool = False,
        gate: Gate = OPEN,
        reseal: bool = False,
    ) -> None:
        self._conn = conn
        self._resource_type, self._run_id = resource_type, plain_text(run_id)
        self._params = {"run": run_id, "sealed_by": sealing_of(conn).key_id}
        self._mend = mend
        self._definitions = views
        self._views = [view.name for view in views]
        self._sealing = sealing_of(conn)
        self._chunk: dict[str, _Held] = {}
        self._bytes = 0
        self._counts = LoadCounts(rows=Counter({view.name: 0 for view in views}))
        self._unloadable: list[Unloadable] = []
        self._statements = LoadStatements(resource_type, views, sealed=self._sealing.on, gate=gate, reseal=reseal)
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

    def add(self, items: Iterable[tuple[Record, ViewRows]], partition_key: str) -> list[Unloadable]:
        """Prepare and take resources of one partition. Returns those found unloadable since the last call (the
        partition of each is in it). Raises DatabaseUnavailable; the transaction is then lost.
        """
        for record, rows in items:
            try:
                prepared = self._preparation.prepare(record, partition_key, rows)
            except Unfit as unfit:
                self._refused(
                    Unloadable(record.id, partition_key, record.body, unfit.view, unfit.column, unfit.message)
                )
                continue
            self._hold(_Held(prepared, partition_key, record.body))
        return self._drain()

    def take(self, items: Iterable[tuple[Prepared, bytes]], partition_key: str) -> list[Unloadable]:
        """As ``add``, of resources that were prepared elsewhere; each comes with its body, as it was received."""
        for prepared, body in items:
            self._hold(_Held(prepared, partition_key, body))
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

    def late(self) -> list[Unloadable]:
        """The unloadable resources that ``finish`` found."""
        return self._drain()

    @cached_property
    def _preparation(self) -> Preparation:
        return Preparation(self._definitions, self._sealing)

    def _drain(self) -> list[Unloadable]:
        found, self._unloadable = self._unloadable, []
        return found

    def _refused(self, unloadable: Unloadable) -> None:
        self._unloadable.append(unloadable)
        self._counts.unloadable += 1

    def _hold(self, held: _Held) -> None:
        prepared = held.prepared
        earlier = self._chunk.get(prepared.id)
        if earlier is not None:
            self._counts.superseded += 1
            if prepared.order < earlier.prepared.order:
                return
            self._bytes -= earlier.prepared.size
        self._chunk[prepared.id] = held
        self._bytes += prepared.size
        if len(self._chunk) >= CHUNK_RESOURCES or self._bytes >= CHUNK_BYTES:
            self._flush()

    def _flush(self) -> None:
        self.wait()
        if not self._chunk:
            return
        # In the order of ids, so that two loads do not wait for each other crosswise.
        chunk = [self._chunk[key] for key in sorted(self._chunk)]
        self._chunk, self._bytes = {}, 0
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

    def _write(self, chunk: list[_Held]) -> _Outcome:
        outcome = _Outcome()
        try:
            # Begins the caller's transaction, if nothing has: a chunk alone must not be one.
            self._conn.execute("SELECT")
            if self._statements.gate and not self._decided:
                consents.keep_decisions(self._conn)
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

    def _write_or_halve(self, chunk: list[_Held], outcome: _Outcome) -> None:
        """Write a chunk, or what Postgres takes of it: the rare resource that it refuses is found by halving."""
        try:
            with self._conn.transaction():
                updated, winners, withheld = self._insert(chunk) or self._merge(chunk)
        except (psycopg.DataError, psycopg.errors.ProgramLimitExceeded, psycopg.errors.StatementTooComplex) as error:
            if len(chunk) > 1:
                middle = len(chunk) // 2
                self._write_or_halve(chunk[:middle], outcome)
                self._write_or_halve(chunk[middle:], outcome)
                return
            view, column = self._place(error)
            (prepared, partition_key, body) = chunk[0]
            outcome.refused.append(Unloadable(prepared.id, partition_key, body, view, column, _said(error)))
            return
        outcome.updated += updated
        outcome.inserted += len(winners) - updated
        outcome.superseded += len(chunk) - len(winners) - len(withheld)
        outcome.withheld.update(pending.partition_key for pending in withheld)
        for place, view in enumerate(self._views):
            outcome.rows[view] += sum([held.prepared.counts[place] for held in winners])

    def _insert(self, chunk: list[_Held]) -> _Written | None:
        """Copy a chunk of new resources to where they belong; None, and nothing written, if one of them is there."""
        statements = self._statements
        if self._mend or not statements.may_insert:
            return None
        with self._conn.cursor() as cursor:
            known, now = cursor.execute(statements.known, [[held.prepared.id for held in chunk]]).fetchone() or (0, "")
            if known:
                return None
            facts = (self._resource_type, self._run_id, str(now), self._sealing.key_id or NULL, "")
            start = "\t".join(facts).encode()
            try:
                with self._conn.transaction(), cursor.copy(statements.copy_new) as copy:
                    copy.write(start + (b"\n" + start).join([held.prepared.head for held in chunk]))
            except psycopg.errors.UniqueViolation:
                # Another load brought one of them in this moment.
                return None
            self._copy_rows(cursor, chunk)
        return 0, chunk, []

    def _merge(self, chunk: list[_Held]) -> _Written:
        """Put a chunk in by way of a table of its own, so that the newest versions win."""
        statements = self._statements
        with self._conn.cursor() as cursor:
            cursor.execute(statements.stage)
            with cursor.copy(statements.copy_stage) as copy:
                copy.write(b"\n".join([held.prepared.head for held in chunk]))
            gone, taken_back = self._withhold(cursor)
            inserted: dict[str, bool] = dict(cursor.execute(statements.upsert, self._params).fetchall())
            cursor.execute(statements.clear_stage)
            winners = [held for held in chunk if held.prepared.id in inserted]
            updated = [key for key, new in inserted.items() if not new]
            stale = (list(inserted) if self._mend else updated) + taken_back
            if stale:
                for delete, _ in statements.views:
                    cursor.execute(delete, [stale])
            self._copy_rows(cursor, winners)
        return len(updated), winners, [held for held in chunk if held.prepared.id in gone]

    def _copy_rows(self, cursor: psycopg.Cursor[Any], winners: list[_Held]) -> None:
        for place, (_, copy_rows) in enumerate(self._statements.views):
            lines = b"".join([held.prepared.lines[place] for held in winners])
            if lines:
                with cursor.copy(copy_rows) as copy:
                    copy.write(lines)

    def _withhold(self, cursor: psycopg.Cursor[Any]) -> tuple[frozenset[str], list[str]]:
        """Note what Consents say; then the ids in the stage that are withheld, and those of them that had rows."""
        for statement in self._statements.consents:
            cursor.execute(statement, self._params)
        gate = self._statements.gate
        if gate is None:
            return frozenset(), []
        gone = [key for (key,) in cursor.execute(gate.withhold, self._params)]
        cursor.execute(gate.superseded)
        cursor.execute(gate.released)
        taken_back: list[str] = []
        if gone:
            taken_back = [key for (key,) in cursor.execute(gate.taken_back, {"ids": gone})]
            cursor.execute(gate.outdated, {"ids": gone})
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
