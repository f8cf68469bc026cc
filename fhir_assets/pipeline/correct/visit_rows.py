"""Rows of visit files that became dead letters: received again, as they are or as a person corrected them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import orjson

from fhir_assets.errors import CorrectionRefused
from fhir_assets.fhir.intake import visits_csv
from fhir_assets.fhir.intake.visits_csv import InvalidRow, Visit
from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.pipeline.landing import visit_resources
from fhir_assets.pipeline.receive.receiver import Received, Receiver
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.warehouse.ops import rejected_rows, replays, visits
from fhir_assets.warehouse.ops.dead_letters import Selection, StoredDeadLetter
from fhir_assets.warehouse.ops.rejected_rows import RejectedRow
from fhir_assets.warehouse.ops.replays import FailedReplay
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session

RULES = (visits_csv.ROW_RULE, visits_csv.SCHEMA_RULE, visit_resources.CONFLICT, visit_resources.PERSON_CONFLICT)
"""The rules of dead letters that are rows."""

ROWS_PER_RECEIPT = 1000
"""The largest number of rows that one transaction receives."""

_TYPE = "Encounter"
_HEADER = ",".join(visits_csv.COLUMNS).encode() + b"\r\n"


def is_visit_row(dead_letter: StoredDeadLetter) -> bool:
    """Return whether a dead letter is a row of a visit file."""
    return dead_letter.stage == "fetch" and dead_letter.resource_type == _TYPE and dead_letter.rule in RULES


def read_row(text: bytes) -> dict[str, str]:
    """Return the visit in a text: an object of JSON, or CSV with one row, whose header may be left out.

    Raises CorrectionRefused with all errors if it is not a valid visit.
    """
    values = _parse_object(text)
    if values is not None:
        # As in a file, an empty value stands for a missing one.
        stated = {name: value for name, value in values.items() if value != "" or name == "reason"}
        if problems := visits_csv.find_errors(stated):
            raise _refuse(problems)
        text = visits_csv.write([{name: str(value) for name, value in stated.items()}])
    rows = list(visits_csv.read([text]))
    if len(rows) == 1 and isinstance(rows[0], InvalidRow) and rows[0].rule == visits_csv.HEADER_RULE:
        rows = list(visits_csv.read([_HEADER + text]))
    if len(rows) != 1:
        raise CorrectionRefused(
            f"it has {len(rows)} rows: pass one visit, as a JSON object or as CSV with the columns "
            f"{', '.join(visits_csv.COLUMNS)}"
        )
    if isinstance(rows[0], InvalidRow):
        raise _refuse(rows[0].problems)
    return {column: rows[0].values.get(column, "") for column in visits_csv.COLUMNS}


def receive_correction(
    receiver: Receiver,
    dead_letter_id: int,
    row: Mapping[str, str],
    origin: str,
    record: Callable[[Session], None],
) -> Received:
    """Receive a visit that a person states in place of a row; it counts as of now.

    A visit that is known already changes nothing. ``record`` records the correction in the transaction of the receipt.
    Raises CorrectionRefused if the visit contradicts a known person or visit, or if the dead letter was resolved
    meanwhile; nothing is received then.
    """
    visit = Visit(row, str(dead_letter_id), receiver.now())

    def read(conn: Session) -> list[Record]:
        visits.lock_ledger(conn)
        if not rejected_rows.lock(conn, [dead_letter_id], ("open", "discarded")):
            raise CorrectionRefused(f"dead letter {dead_letter_id} was resolved meanwhile: nothing was stored")
        records = []
        for item in visit_resources.read_new_resources(conn, [visit], origin, origin, receiver.resource_types):
            if isinstance(item, RejectedInput):
                raise CorrectionRefused(item.message)
            records.append(item)
        return records

    return receiver.receive_in_transaction(read, origin, before_commit=record)


@dataclass(frozen=True, slots=True)
class RowReplay:
    """How many rows were received again, and were rejected again; ``remaining`` were left out because of a limit."""

    received: int = 0
    failed: int = 0
    remaining: int = 0


class RowReplayStep:
    """Receives open dead letters that are rows again, for example after a visit that they contradicted was deleted.

    A row counts as of the arrival of its file, so that it does not replace newer data of a person.
    """

    def __init__(self, connect: OpenSession, receiver: Receiver) -> None:
        self._connect = connect
        self._receiver = receiver

    def run(
        self,
        selection: Selection,
        audit_record: AuditRecord,
        *,
        run_id: str,
        limit: int | None = None,
        posted: bool = False,
    ) -> RowReplay:
        """Receive the open rows of a selection again. Those that fail stay open, with one more attempt.

        Each ``ROWS_PER_RECEIPT`` rows are received in one transaction, which also writes the audit record with their
        number. Rows that another transaction resolves or discards meanwhile are left out. With a ``limit``, the rows
        that failed last are left out. Other runs load what was received; the post loader does, if it is ``posted``.

        Raises DatabaseUnavailable and StoreError; earlier transactions stay committed.
        """
        if selection.resource_type not in (None, _TYPE) or selection.stage not in (None, "fetch"):
            return RowReplay()
        with self._connect() as conn:
            found = rejected_rows.find_open(conn, selection, RULES)
        chosen = found[:limit]
        received = failed = 0
        for start in range(0, len(chosen), ROWS_PER_RECEIPT):
            ids = chosen[start : start + ROWS_PER_RECEIPT]
            receipt = _RowReceipt(self._receiver, ids, f"replay:{run_id}-{start}", run_id)
            receipt.receive(audit_record, posted=posted)
            received, failed = received + receipt.received, failed + receipt.failed
        return RowReplay(received, failed, len(found) - len(chosen))


class _RowReceipt:
    """Receives rows again, as one origin in one transaction."""

    def __init__(self, receiver: Receiver, ids: Sequence[int], origin: str, run_id: str) -> None:
        self._receiver = receiver
        self._ids = ids
        self._origin = origin
        self._run_id = run_id
        self._rows: dict[int, RejectedRow] = {}
        self._failures: list[FailedReplay] = []

    @property
    def received(self) -> int:
        return len(self._rows) - len(self._failures)

    @property
    def failed(self) -> int:
        return len(self._failures)

    def receive(self, audit_record: AuditRecord, *, posted: bool) -> None:
        self._receiver.receive_in_transaction(
            self._read,
            self._origin,
            audit_records=lambda _: [replace(audit_record, count=len(self._rows))],
            before_commit=self._record,
            posted=posted,
        )

    def _read(self, conn: Session) -> Iterator[Record]:
        visits.lock_ledger(conn)
        self._rows = {row.id: row for row in rejected_rows.lock(conn, self._ids, ("open",))}
        types = self._receiver.resource_types
        items = visit_resources.read_new_resources(conn, self._parse_rows(), self._origin, self._origin, types)
        for item in items:
            if isinstance(item, RejectedInput):
                # Not passed on: the dead letter exists, and it is locked.
                self._fail(self._rows[int(item.path)], item.rule, item.message)
            else:
                yield item

    def _parse_rows(self) -> Iterator[Visit]:
        """Yield the valid rows. The location is the id of the dead letter."""
        for row in self._rows.values():
            try:
                yield Visit(read_row(row.body), str(row.id), row.arrived)
            except CorrectionRefused as error:
                self._fail(row, row.rule, str(error))

    def _fail(self, row: RejectedRow, rule: str, message: str) -> None:
        self._failures.append(FailedReplay(row.id, rule, row.path, message, [], ""))

    def _record(self, conn: Session) -> None:
        replays.record_failures(conn, self._run_id, self._failures)
        failed = {failure.id for failure in self._failures}
        replays.resolve_received(conn, [number for number in self._rows if number not in failed], resolution="replayed")


def _parse_object(text: bytes) -> dict[str, object] | None:
    try:
        values = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return values if isinstance(values, dict) else None


def _refuse(problems: tuple[tuple[str, str], ...]) -> CorrectionRefused:
    described = "; ".join(f"{column.removeprefix('/')}: {message}".removeprefix(": ") for column, message in problems)
    return CorrectionRefused(f"the row is not a valid visit: {described}")
