"""The doors beside the source: whatever enters through them is put into raw, where later fetches leave it alone.

Landing files, intake, missing references and corrections all come through ``receive``. What they brought is noted in
``ops.received``; loading it is the business of `load_received`, or of any other run over those windows.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

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
from fhir_assets.warehouse.ops.received import Receiving
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session
from fhir_assets.windows import Window, WindowScheme


@dataclass(frozen=True, slots=True)
class Received:
    """What an origin brought, by type and window; ``again`` if it had been received before, and nothing was done.

    ``skipped`` counts, by type, resources of types that this deployment does not load.
    """

    origin: str
    items: tuple[Receiving, ...]
    skipped: Counter[str] = field(default_factory=Counter)
    already_received: bool = False

    @property
    def rows(self) -> int:
        """How many resources are in raw now."""
        return sum(item.rows for item in self.items)

    @property
    def rejected(self) -> int:
        """How many became dead letters at once."""
        return sum(item.rejected for item in self.items)


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
    ) -> None:
        self._store = store
        self._connect = connect
        self._scheme = scheme
        self.resource_types = frozenset(resource_types)
        """Those that are loaded here; resources of others are counted, and go no further."""
        self._now = now
        self.deletion_log = DeletionLog(store, connect, now=now)
        """What the same doors bring of deletions."""

    def receive(
        self,
        records: Iterable[Record | RejectedInput],
        origin: str,
        *,
        audit_records: Callable[[Received], Iterable[AuditRecord]] = lambda _: (),
    ) -> Received:
        """Take everything that ``origin`` brings, streamed: all of it is in raw and in the dead letters afterwards, or
        nothing counts as received and the origin may come again.

        An origin is ``<channel>:<identity>`` (``landing:<sha256>``, ``api:<request>``), and the same content for ever:
        the second time nothing is done, and records are not read. Resources go into the window of their
        ``lastUpdated``, or of their arrival where they have none or one in the future.

        ``deeds`` go on record in the transaction that notes it as received.

        Raises StoreError, DatabaseUnavailable, Overtaken, and what ``records`` raises.
        """
        return self.receive_in_transaction(lambda _: records, origin, audit_records=audit_records)

    def receive_in_transaction(
        self,
        bring: Callable[[Session], Iterable[Record | RejectedInput]],
        origin: str,
        *,
        audit_records: Callable[[Received], Iterable[AuditRecord]] = lambda _: (),
    ) -> Received:
        """As ``receive``, of what ``bring`` makes: what it writes through the connection that it is given is committed
        together with the note that the origin was received, or not at all.
        """
        with self._connect() as conn:
            received.hold(conn, origin)
            if before := received.of_origin(conn, origin):
                return Received(origin, tuple(before), already_received=True)
            return self._receive(conn, bring(conn), origin, audit_records)

    def _receive(
        self,
        conn: Session,
        records: Iterable[Record | RejectedInput],
        origin: str,
        audit_records: Callable[[Received], Iterable[AuditRecord]],
    ) -> Received:
        now = self._now()
        intake = _Intake(self._scheme, self.resource_types, origin, now)
        letters = DeadLetterBuffer(lambda batch: dead_letters.record_now(self._connect, origin, batch))
        with PartWriter(self._store, "raw") as writer:
            for item in records:
                intake.take(item, writer, letters)
            letters.flush()
            parts = writer.finish()
        items = intake.items(parts)
        rewrite_partitions(self._connect, self._store, intake.manifests(parts, items), _joined)
        brought = Received(origin, tuple(items), intake.skipped)
        received.note(conn, origin, items)
        audit_log.record(conn, *audit_records(brought))
        conn.commit()
        return brought


class _Intake:
    """One receiving on its way."""

    def __init__(self, scheme: WindowScheme, types: frozenset[str], origin: str, now: datetime) -> None:
        self._scheme = scheme
        self._types = types
        self._origin = origin
        self._now = now
        self._rejected: Counter[tuple[str, str]] = Counter()
        self.skipped: Counter[str] = Counter()

    def take(self, item: Record | RejectedInput, writer: PartWriter, letters: DeadLetterBuffer) -> None:
        if isinstance(item, RejectedInput):
            key = self._window(item.arrived).key
            self._rejected[item.resource_type, key] += 1
            letters.add(self._letter(item, key))
        elif item.resource_type not in self._types:
            self.skipped[known_resource_type(item.resource_type)] += 1
        else:
            moment = item.as_of if item.as_of < self._now else item.arrived
            writer.add(item.resource_type, self._window(moment).key, item.body, item.last_updated)

    def items(self, parts: dict[tuple[str, str], tuple[Part, ...]]) -> list[Receiving]:
        found = defaultdict[tuple[str, str], tuple[Part, ...]](tuple, parts)
        return [
            Receiving(
                *place,
                tuple(part.name for part in found[place]),
                sum(part.rows for part in found[place]),
                self._rejected[place],
            )
            for place in sorted(parts.keys() | self._rejected.keys())
        ]

    def manifests(self, parts: dict[tuple[str, str], tuple[Part, ...]], items: Sequence[Receiving]) -> list[Manifest]:
        """A manifest a window that holds nothing but what was received now."""
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
            for item in items
            if item.resource_type in self._types
        ]

    def _window(self, moment: datetime) -> Window:
        return self._scheme.window_at(min(moment, self._now))

    def _letter(self, item: RejectedInput, partition_key: str) -> DeadLetter:
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
        )


def _joined(mine: Manifest, now: Manifest | None) -> Manifest:
    """The partition with what was received in it, once: an origin that came before and was not noted as received
    gives way to its second coming.
    """
    if now is None:
        return mine
    origins = {receipt.origin for receipt in mine.receipts}
    return msgspec.structs.replace(
        now,
        run_id=mine.run_id,
        written_at=mine.written_at,
        parts=(*(part for part in now.parts if part.origin not in origins), *mine.parts),
        receipts=(*(receipt for receipt in now.receipts if receipt.origin not in origins), *mine.receipts),
    )
