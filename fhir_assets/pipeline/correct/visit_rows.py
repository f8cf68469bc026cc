"""Rows of visit files that became dead letters: received again, as they are or as a person corrected them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import orjson

from fhir_assets.errors import CorrectionRefused
from fhir_assets.fhir.intake import visits_csv
from fhir_assets.fhir.intake.visits_csv import InvalidRow, Visit
from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.pipeline.landing import visit_resources
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.warehouse.ops import dead_letters, replays
from fhir_assets.warehouse.ops.dead_letters import Selection, StoredDeadLetter
from fhir_assets.warehouse.ops.replays import FailedReplay
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session

RULES = (visits_csv.ROW_RULE, visits_csv.SCHEMA_RULE, visit_resources.CONFLICT, visit_resources.PERSON_CONFLICT)
"""The rules of dead letters that are rows."""

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


def receive_row(receiver: Receiver, dead_letter: StoredDeadLetter, row: Mapping[str, str], origin: str) -> None:
    """Receive a visit in place of the row that became a dead letter. A visit that is known already changes nothing.

    Raises CorrectionRefused if it contradicts a known person or visit; nothing is received then.
    """
    visit = Visit(row, dead_letter.path, datetime.now(UTC))

    def read(conn: Session) -> list[Record]:
        records = []
        for item in visit_resources.read_new_resources(conn, [visit], origin, origin, receiver.resource_types):
            if isinstance(item, RejectedInput):
                raise CorrectionRefused(item.message)
            records.append(item)
        return records

    receiver.receive_in_transaction(read, origin)


@dataclass(frozen=True, slots=True)
class RowReplay:
    """How many rows were received again, and how many were rejected again."""

    received: int = 0
    failed: int = 0


class RowReplayStep:
    """Receives open dead letters that are rows again, for example after a visit that they contradicted was deleted."""

    def __init__(self, connect: OpenSession, receiver: Receiver) -> None:
        self._connect = connect
        self._receiver = receiver

    def run(self, selection: Selection, *, run_id: str) -> RowReplay:
        """Receive the open rows of a selection again. Those that fail stay open, with one more attempt.

        Other runs load what was received. Raises DatabaseUnavailable and StoreError.
        """
        received = failed = 0
        rows = Selection(
            ids=selection.ids,
            run_id=selection.run_id,
            resource_type=_TYPE,
            stage="fetch",
            rule=selection.rule,
            status="open",
            partition_keys=selection.partition_keys,
            origins=selection.origins,
            since=selection.since,
            until=selection.until,
        )
        if selection.resource_type not in (None, _TYPE) or selection.stage not in (None, "fetch"):
            return RowReplay()
        with self._connect() as reading:
            for dead_letter, body in dead_letters.stream(reading, rows):
                if is_visit_row(dead_letter):
                    passed = self._receive(dead_letter, body or b"", run_id)
                    received, failed = received + passed, failed + (not passed)
        return RowReplay(received, failed)

    def _receive(self, dead_letter: StoredDeadLetter, body: bytes, run_id: str) -> bool:
        try:
            receive_row(self._receiver, dead_letter, read_row(body), f"replay:{run_id}-{dead_letter.id}")
        except CorrectionRefused as error:
            failure = FailedReplay(dead_letter.id, dead_letter.rule, dead_letter.path, str(error), [], "")
            with self._connect() as conn:
                replays.record_failures(conn, run_id, [failure])
            return False
        with self._connect() as conn:
            replays.resolve_received(conn, dead_letter.id, resolution="replayed")
        return True


def _parse_object(text: bytes) -> dict[str, object] | None:
    try:
        values = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return values if isinstance(values, dict) else None


def _refuse(problems: tuple[tuple[str, str], ...]) -> CorrectionRefused:
    described = "; ".join(f"{column.removeprefix('/')}: {message}".removeprefix(": ") for column, message in problems)
    return CorrectionRefused(f"the row is not a valid visit: {described}")
