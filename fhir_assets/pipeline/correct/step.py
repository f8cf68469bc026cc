"""Corrections of dead letters by hand: what is accepted as one, and how it comes in."""

from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b

from fhir_assets.errors import CorrectionRefused
from fhir_assets.fhir.patch import apply_patch
from fhir_assets.fhir.record import MalformedResource, build_record, read_header, to_single_line
from fhir_assets.fhir.validation import Validator
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.warehouse.ops import audit_log, corrections, dead_letters, replays
from fhir_assets.warehouse.ops.dead_letters import StoredDeadLetter
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session

CORRECTABLE = ("fetch", *replays.REPLAYED)


@dataclass(frozen=True, slots=True)
class Correction:
    """What is to become of a letter's resource: a JSON Patch of it, or the whole of it anew. Who says so."""

    patch: bytes | None
    resource: bytes | None
    by: str


class CorrectionStep:
    """Takes edits of dead letters."""

    def __init__(self, connect: OpenSession, validator: Validator, receiver: Receiver) -> None:
        self._connect = connect
        self._validator = validator
        self._receiver = receiver

    def run(self, letter_id: int, edit: Correction) -> StoredDeadLetter:
        """Keep a correction; the original is kept beside it. A patch is applied to the last correction, if there is
        one. A letter of stage ``fetch`` never reached raw: its correction is received there at once, and resolves it.

        Raises CorrectionRefused if the letter is settled or the corrected resource would be refused again.
        """
        with self._connect() as conn:
            found = dead_letters.get(conn, letter_id)
            if found is None:
                raise CorrectionRefused(
                    f"there is no dead letter {letter_id}: `fhir-assets dead-letters list` shows what there is"
                )
            letter = found[0]
            if letter.status not in ("open", "discarded") or letter.stage not in CORRECTABLE:
                raise CorrectionRefused(
                    f"dead letter {letter_id} is {letter.status}, of stage {letter.stage}: only open ones of "
                    f"{', '.join(CORRECTABLE)} can be corrected"
                )
            body = self._corrected(conn, letter, edit)
            corrections.keep(conn, letter_id, body, by=edit.by)
            if letter.stage == "fetch":
                self._receive(letter, body)
                replays.corrected_on_arrival(conn, letter_id)
            subject = audit_log.subject(conn, letter.resource_type, read_header(body).id or "")
            audit_log.record(
                conn, AuditRecord("edit", edit.by, letter.resource_type, subject, detail={"letter": letter_id})
            )
        return letter

    def _corrected(self, conn: Session, letter: StoredDeadLetter, edit: Correction) -> bytes:
        if edit.resource is not None:
            body = to_single_line(edit.resource)
        else:
            before = corrections.of_letter(conn, letter.id)
            original = before.resource if before else dead_letters.resource(conn, letter.id)
            body = apply_patch(original or b"", edit.patch or b"")
        try:
            header = read_header(body)
        except MalformedResource as error:
            raise CorrectionRefused(f"the corrected resource is {error}") from None
        if header.resourceType != letter.resource_type:
            raise CorrectionRefused(f"the corrected resource is no {letter.resource_type}, as the dead letter is")
        if header.id is None or (letter.resource_id is not None and header.id != letter.resource_id):
            raise CorrectionRefused("the corrected resource must have the dead letter's id, or any if that had none")
        errors = [issue for issue in self._validator.check(body).issues if issue.severity == "error"]
        if errors:
            said = "; ".join(f"{issue.rule} at {issue.path}: {issue.message}" for issue in errors[:5])
            more = f" (and {len(errors) - 5} more)" if len(errors) > 5 else ""
            raise CorrectionRefused(f"the corrected resource would be refused again: {said}{more}. Nothing was kept")
        return body

    def _receive(self, letter: StoredDeadLetter, body: bytes) -> None:
        origin = f"correction:{letter.id}-{blake2b(body, digest_size=8).hexdigest()}"
        self._receiver.receive([build_record(body, read_header(body), datetime.now(UTC))], origin)
