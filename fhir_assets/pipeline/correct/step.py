"""Corrects dead letters by hand: validates and stores a corrected resource, which the next replay uses."""

from dataclasses import dataclass
from hashlib import blake2b

import orjson

from fhir_assets.errors import CorrectionRefused
from fhir_assets.fhir.patch import apply_patch
from fhir_assets.fhir.record import MalformedResource, build_record, read_header, to_single_line
from fhir_assets.fhir.validation import Validator
from fhir_assets.pipeline.correct import visit_rows
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.warehouse.ops import audit_log, corrections, dead_letters, replays
from fhir_assets.warehouse.ops.dead_letters import StoredDeadLetter
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session, cipher_of

CORRECTABLE = ("fetch", *replays.REPLAYABLE_STAGES)
"""The stages whose dead letters can be corrected."""


@dataclass(frozen=True, slots=True)
class Correction:
    """A correction of a dead letter's resource: either a JSON Patch (RFC 6902) or the complete corrected resource.

    The resource of a row of a visit file is a visit, as JSON or as CSV.

    ``by`` is the person who is said to have made the correction, and ``actor`` the verified one of the audit log.
    """

    patch: bytes | None
    resource: bytes | None
    by: str
    actor: str


class CorrectionStep:
    """Validates and stores corrections of dead letters."""

    def __init__(self, connect: OpenSession, validator: Validator, receiver: Receiver) -> None:
        self._connect = connect
        self._validator = validator
        self._receiver = receiver

    def run(self, dead_letter_id: int, correction: Correction) -> StoredDeadLetter:
        """Store a correction in addition to the original resource. Return the dead letter as it was before.

        A patch is applied to the last correction if there is one, otherwise to the original resource. Dead letters of
        stage ``fetch`` have no resource in raw: their correction is received into raw, which resolves them.

        Raises CorrectionRefused if the dead letter is neither open nor discarded, if its stage cannot be corrected, or
        if the corrected resource is invalid.
        """
        with self._connect() as conn:
            stored = dead_letters.get(conn, dead_letter_id)
            if stored is None:
                raise CorrectionRefused(
                    f"there is no dead letter {dead_letter_id}: `fhir-assets dead-letters list` lists them"
                )
            dead_letter = stored[0]
            if dead_letter.status not in ("open", "discarded") or dead_letter.stage not in CORRECTABLE:
                raise CorrectionRefused(
                    f"dead letter {dead_letter_id} of stage {dead_letter.stage} is {dead_letter.status}: only open "
                    f"or discarded dead letters of the stages {', '.join(CORRECTABLE)} can be corrected"
                )
            body = self._build_corrected(conn, dead_letter, correction)
            is_row = visit_rows.is_visit_row(dead_letter)
            if not is_row:
                if dead_letter.stage == "fetch":
                    records = [build_record(body, read_header(body), self._receiver.now())]
                    self._receiver.receive(records, _build_origin(dead_letter, body))
                _record(conn, dead_letter, body, correction)
        if is_row:
            self._receive_row(dead_letter, body, correction)
        return dead_letter

    def _receive_row(self, dead_letter: StoredDeadLetter, body: bytes, correction: Correction) -> None:
        def record(conn: Session) -> None:
            _record(conn, dead_letter, body, correction)

        origin = _build_origin(dead_letter, body)
        result = visit_rows.receive_correction(self._receiver, dead_letter.id, orjson.loads(body), origin, record)
        if result.already_received:
            with self._connect() as conn:
                record(conn)

    def _build_corrected(self, conn: Session, dead_letter: StoredDeadLetter, correction: Correction) -> bytes:
        if correction.resource is not None:
            body = correction.resource
        else:
            earlier = corrections.get(conn, dead_letter.id)
            original = earlier.resource if earlier else dead_letters.read_resource(conn, dead_letter.id)
            body = apply_patch(original or b"", correction.patch or b"")
        if visit_rows.is_visit_row(dead_letter):
            return orjson.dumps(visit_rows.read_row(body))
        if correction.resource is not None:
            body = to_single_line(body)
        try:
            header = read_header(body)
        except MalformedResource as error:
            raise CorrectionRefused(f"the corrected resource is {error}") from None
        if header.resource_type != dead_letter.resource_type:
            raise CorrectionRefused(
                f"the corrected resource must be of type {dead_letter.resource_type}, the type of the dead letter"
            )
        if header.id is None or (dead_letter.resource_id is not None and header.id != dead_letter.resource_id):
            raise CorrectionRefused(
                "the corrected resource must have the id of the dead letter, or any id if the dead letter has none"
            )
        errors = [issue for issue in self._validator.check(body).issues if issue.severity == "error"]
        if errors:
            details = "; ".join(f"{issue.rule} at {issue.path}: {issue.message}" for issue in errors[:5])
            more = f" (and {len(errors) - 5} more)" if len(errors) > 5 else ""
            raise CorrectionRefused(f"the corrected resource is invalid: {details}{more}. It was not stored")
        return body


def _build_origin(dead_letter: StoredDeadLetter, body: bytes) -> str:
    return f"correction:{dead_letter.id}-{blake2b(body, digest_size=8).hexdigest()}"


def _record(conn: Session, dead_letter: StoredDeadLetter, body: bytes, correction: Correction) -> None:
    """Record the correction and its audit record. A dead letter of stage ``fetch`` is received, and resolved."""
    corrections.record(conn, dead_letter.id, body, by=correction.by)
    if dead_letter.stage == "fetch":
        replays.resolve_received(conn, [dead_letter.id], resolution="corrected")
    subject = audit_log.hash_subject(conn, dead_letter.resource_type, _identify(conn, dead_letter, body))
    detail: dict[str, str | int | bool | None] = {"dead_letter": dead_letter.id}
    audit_log.record(
        conn,
        AuditRecord("edit", correction.actor, dead_letter.resource_type, subject, detail=detail, claim=correction.by),
    )


def _identify(conn: Session, dead_letter: StoredDeadLetter, body: bytes) -> str:
    """Return the id of the corrected resource."""
    if visit_rows.is_visit_row(dead_letter):
        return cipher_of(conn).identity("Encounter", orjson.loads(body)["visit_account_number"])
    return read_header(body).id or ""
