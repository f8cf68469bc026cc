"""Receives resources into raw from every ingestion channel except the configured source.

The channels are landing files, HTTP intake, missing references and corrections. Later fetches of a window keep its
received parts. The table ``ops.received`` lists the received parts; the job ``load_received``, or any other run over
the same windows, loads them into the tables.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec
import psycopg

from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.fhir.model import known_resource_type
from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.pipeline.dead_letter_buffer import DeadLetterBuffer
from fhir_assets.pipeline.deletions.deletion_log import DeletionLog
from fhir_assets.pipeline.partition_commit import rewrite_partitions
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.storage.manifest import Manifest, Part, Receipt
from fhir_assets.storage.part_writer import PartWriter
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import audit_log, dead_letters, received
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.ops.received import ReceivedWindow
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session, is_alive
from fhir_assets.windows import Window, WindowScheme


@dataclass(frozen=True, slots=True)
class Received:
    """The resources of one origin, by type and window.

    ``skipped`` counts, by type, resources of types that this deployment does not load. ``already_received`` states
    whether the origin was received before, so that nothing was written now.
    """

    origin: str
    windows: tuple[ReceivedWindow, ...]
    skipped: Counter[str] = field(default_factory=Counter)
    already_received: bool = False

    @property
    def rows(self) -> int:
        """How many resources were written to raw."""
        return sum(window.rows for window in self.windows)

    @property
    def rejected(self) -> int:
        """How many entries became dead letters instead."""
        return sum(window.rejected for window in self.windows)


class Receiver:
    """Receives resources into the raw layer of a store."""

    def __init__(
        self,
        store: Store,
        connect: OpenSession,
        scheme: WindowScheme,
        resource_types: Sequence[str],
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Create the receiver. ``check`` raises an error if nothing may be received: see SourceBinding.require."""
        self.check = check
        self._store = store
        self._connect = connect
        self._scheme = scheme
        self.resource_types = frozenset(resource_types)
        """The types that this deployment loads. Resources of other types are counted and skipped."""
        self.now = now
        """Returns the time at which what is received now arrives."""
        self.deletion_log = DeletionLog(store, connect, now=now)
        """Records the deletions that arrive through the same channels."""

    def receive(
        self,
        records: Iterable[Record | RejectedInput],
        origin: str,
        *,
        audit_records: Callable[[Received], Iterable[AuditRecord]] = lambda _: (),
        before_commit: Callable[[Session], None] = lambda _: None,
        posted: bool = False,
        run_id: str | None = None,
    ) -> Received:
        """Receive all records of ``origin`` as a stream: write each one to raw or record it as a dead letter.

        The origin is recorded as received after its last record. After an error it can be received again.

        An origin has the form ``<channel>:<identity>`` (``landing:<sha256>``, ``api:<request>``) and always identifies
        the same content: an origin that was received before is skipped, and its records are not read. A resource is
        written to the window of its ``lastUpdated``, or of its arrival if that is missing or does not count.

        The ``audit_records`` are written in the transaction that records the origin as received, and ``before_commit``
        may write to it. ``posted`` states that the records were posted over HTTP: the post loader is notified.
        Dead letters belong to the run ``run_id``, or to the origin if no run receives it.

        Raises StoreError, DatabaseUnavailable, Overtaken, and the errors of ``records``.
        """
        return self.receive_in_transaction(
            lambda _: records,
            origin,
            audit_records=audit_records,
            before_commit=before_commit,
            posted=posted,
            run_id=run_id,
        )

    def receive_in_transaction(
        self,
        read_records: Callable[[Session], Iterable[Record | RejectedInput]],
        origin: str,
        *,
        audit_records: Callable[[Received], Iterable[AuditRecord]] = lambda _: (),
        before_commit: Callable[[Session], None] = lambda _: None,
        posted: bool = False,
        run_id: str | None = None,
    ) -> Received:
        """Receive like ``receive``, with records from ``read_records``.

        The statements that ``read_records`` executes on the connection are committed in the transaction that records
        the origin as received.
        """
        self.check()
        with self._connect() as conn:
            received.lock_origin(conn, origin)
            if earlier := received.list_by_origin(conn, origin):
                return Received(origin, tuple(earlier), already_received=True)
            return self._receive(conn, read_records(conn), origin, run_id, audit_records, before_commit, posted)

    def _receive(
        self,
        conn: Session,
        records: Iterable[Record | RejectedInput],
        origin: str,
        run_id: str | None,
        audit_records: Callable[[Received], Iterable[AuditRecord]],
        before_commit: Callable[[Session], None],
        posted: bool,
    ) -> Received:
        now = self.now()
        origin_writer = _OriginWriter(self._scheme, self.resource_types, origin, now)
        dead_letter_buffer = DeadLetterBuffer(
            lambda batch: dead_letters.record_now(self._connect, run_id or origin, batch)
        )
        with PartWriter(self._store, "raw") as writer:
            for item in records:
                origin_writer.add(item, writer, dead_letter_buffer)
            dead_letter_buffer.flush()
            parts = writer.finish()
        windows = origin_writer.build_windows(parts)
        _require_lock(conn)
        rewrite_partitions(self._connect, self._store, origin_writer.build_manifests(parts, windows), _merge)
        result = Received(origin, tuple(windows), origin_writer.skipped)
        received.record(conn, origin, windows, origin_writer.arrivals, posted=posted)
        before_commit(conn)
        audit_log.record(conn, *audit_records(result))
        conn.commit()
        return result


def _require_lock(conn: Session) -> None:
    """Raise DatabaseUnavailable if the session that holds the lock of the origin was lost.

    Another process may then be receiving the same origin, and the parts of both would be committed.
    """
    try:
        is_alive(conn)
    except psycopg.OperationalError as error:
        raise DatabaseUnavailable(
            f"The connection to Postgres was lost while an input was received ({type(error).__name__}): nothing was "
            "received, try again"
        ) from None


class _OriginWriter:
    """Writes the resources of one origin to their windows, and collects the dead letters and counts."""

    def __init__(self, scheme: WindowScheme, types: frozenset[str], origin: str, now: datetime) -> None:
        self._scheme = scheme
        self._types = types
        self._origin = origin
        self._now = now
        self._rejected: Counter[tuple[str, str]] = Counter()
        self.skipped: Counter[str] = Counter()
        self.arrivals: set[datetime] = set()

    def add(self, item: Record | RejectedInput, writer: PartWriter, dead_letter_buffer: DeadLetterBuffer) -> None:
        """Write a resource to its window, or add the dead letter of a rejected entry to the buffer."""
        if isinstance(item, RejectedInput):
            key = self._find_window(item.arrived).key
            self._rejected[item.resource_type, key] += 1
            dead_letter_buffer.add(self._build_dead_letter(item, key))
        elif item.resource_type not in self._types:
            self.skipped[known_resource_type(item.resource_type)] += 1
        else:
            key = self._find_window(item.as_of).key
            self.arrivals.add(item.arrived)
            writer.add(item.resource_type, key, item.body, item.last_updated, arrived=item.arrived, dated=item.dated)

    def build_windows(self, parts: dict[tuple[str, str], tuple[Part, ...]]) -> list[ReceivedWindow]:
        """Return the counts and parts by resource type and window."""
        parts_by_key = defaultdict[tuple[str, str], tuple[Part, ...]](tuple, parts)
        return [
            ReceivedWindow(
                *key,
                tuple(part.name for part in parts_by_key[key]),
                sum(part.rows for part in parts_by_key[key]),
                self._rejected[key],
            )
            for key in sorted(parts.keys() | self._rejected.keys())
        ]

    def build_manifests(
        self, parts: dict[tuple[str, str], tuple[Part, ...]], windows: Sequence[ReceivedWindow]
    ) -> list[Manifest]:
        """Return a manifest for each window, with the parts of this origin only."""
        return [
            Manifest(
                "raw",
                item.resource_type,
                item.partition_key,
                self._origin,
                self._now,
                tuple(
                    msgspec.structs.replace(part, origin=self._origin)
                    for part in parts.get((item.resource_type, item.partition_key), ())
                ),
                receipts=(Receipt(self._origin, self._now, item.rows, item.rejected),),
            )
            for item in windows
            if item.resource_type in self._types
        ]

    def _find_window(self, moment: datetime) -> Window:
        return self._scheme.window_at(min(moment, self._now))

    def _build_dead_letter(self, item: RejectedInput, partition_key: str) -> DeadLetter:
        return DeadLetter(
            resource_type=item.resource_type,
            resource_id=item.resource_id,
            stage="fetch",
            rule=item.rule,
            path=item.path,
            message=item.message,
            resource=item.body or None,
            partition_key=partition_key,
            issues=[dict(issue) for issue in item.issues],
            origin=item.origin or self._origin,
            # A row of a visit file can be received again; then it counts as of this time.
            arrived=item.arrived if item.origin else None,
        )


def _merge(new: Manifest, current: Manifest | None) -> Manifest:
    """Add the received parts to the current partition.

    Parts of the same origin in it are replaced: they are from an attempt that was not recorded as received.
    """
    if current is None:
        return new
    origins = {receipt.origin for receipt in new.receipts}
    return msgspec.structs.replace(
        current,
        run_id=new.run_id,
        written_at=new.written_at,
        parts=(*(part for part in current.parts if part.origin not in origins), *new.parts),
        receipts=(*(receipt for receipt in current.receipts if receipt.origin not in origins), *new.receipts),
    )
