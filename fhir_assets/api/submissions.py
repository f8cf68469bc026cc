"""What one request posts: its accepted records, and the audit records that are written with them."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import orjson

from fhir_assets.fhir.compartment import find_patient_ids
from fhir_assets.fhir.record import Record
from fhir_assets.fhir.references import Bases
from fhir_assets.privacy.audit import Action, AuditRecord
from fhir_assets.warehouse.ops import audit_log
from fhir_assets.warehouse.ops.record_posts import RecordPost, ResourceKey
from fhir_assets.warehouse.postgres.db.connections import Session


@dataclass(frozen=True, slots=True)
class Submission:
    """The accepted records of one request.

    ``subjects`` has, for each record, the resources that its audit records name: the patients of its compartments, or
    the resource itself if it has none. ``count`` of its records were posted, and ``rejected`` were not accepted.
    """

    task_id: str
    records: Sequence[Record]
    subjects: Sequence[tuple[ResourceKey, ...]]
    count: int
    rejected: int
    actor: str
    token: str
    request_id: str

    @property
    def keys(self) -> list[ResourceKey]:
        """The types and ids of the records."""
        return [(record.resource_type, record.id) for record in self.records]

    def build_post(self, origin: str) -> RecordPost:
        """Return the post that is recorded when the records are received as part of ``origin``."""
        return RecordPost(self.task_id, origin, self.count, self.rejected, self.token)


def build_task_id(origin: str) -> str:
    """Return the id of the task of a request. A repeated request has the same origin, and so the same task."""
    return f"records-{hashlib.sha256(origin.encode()).hexdigest()[:32]}"


def find_subjects(record: Record, bases: Bases) -> tuple[ResourceKey, ...]:
    """Return the patients whose compartment contains a resource; the resource itself if no patient is named by id."""
    own = (record.resource_type, record.id)
    if record.resource_type == "Patient":
        return (own,)
    ids = find_patient_ids(orjson.loads(record.body), bases)
    return tuple(("Patient", patient_id) for patient_id in ids if patient_id != "?") or (own,)


def build_audit_records(
    conn: Session, submissions: Sequence[Submission], known: set[ResourceKey]
) -> Iterator[AuditRecord]:
    """Yield the audit records of submissions: one for each action, type and subject of a submission.

    A resource is updated if it is ``known``, or earlier in the submissions, otherwise created. ``known`` is extended.
    """
    for submission in submissions:
        counts = Counter[tuple[str, Action, ResourceKey]]()
        for key, subjects in zip(submission.keys, submission.subjects, strict=True):
            action: Action = "update" if key in known else "create"
            known.add(key)
            counts.update((key[0], action, subject) for subject in subjects)
        for (name, action, subject), count in sorted(counts.items()):
            yield AuditRecord(
                action,
                submission.actor,
                name,
                audit_log.hash_subject(conn, *subject),
                count,
                request_id=submission.request_id,
            )
