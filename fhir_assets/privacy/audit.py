"""Audit records in a hash chain: an altered, missing or inserted record breaks the chain.

With encryption keys a link is an HMAC, so that only a holder of the keys can forge the chain.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher

Action = Literal[
    "read",
    "create",
    "update",
    "delete",
    "export",
    "decrypt",
    "replay",
    "edit",
    "discard",
    "withhold",
    "release",
    "consent decision",
    "key rotation",
]

START = bytes(32)
"""The link before the first record."""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One audited action: the actor, the action, the resource and the run or request it belongs to.

    It contains no patient data. ``subject`` names a resource by its keyed hash (``Cipher.subject``); a bulk action has
    only a ``count`` of resources. ``detail`` holds short words and numbers.
    """

    action: Action
    actor: str
    resource_type: str | None = None
    subject: str | None = None
    count: int = 1
    run_id: str | None = None
    request_id: str | None = None
    detail: dict[str, str | int | bool | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored audit record with its number and link. ``keyed`` is whether the link is an HMAC made with keys."""

    seq: int
    at: datetime
    audit_record: AuditRecord
    keyed: bool
    link: bytes


@dataclass(frozen=True, slots=True)
class Fault:
    """The first record of the audit log that was altered, is missing or was inserted.

    `fhir-assets audit verify --json` prints the fields under these names.
    """

    seq: int
    what: Literal["altered", "missing", "inserted"]

    def __str__(self) -> str:
        return f"record {self.seq} of ops.audit_log is {self.what}"


def link(seq: int, at: datetime, audit_record: AuditRecord, previous: bytes, cipher: Cipher) -> bytes:
    """Return the link of a record, computed from its content and the ``previous`` link."""
    content = [
        seq,
        at.astimezone(UTC).isoformat(timespec="microseconds"),
        audit_record.action,
        audit_record.actor,
        audit_record.resource_type,
        audit_record.subject,
        audit_record.count,
        audit_record.run_id,
        audit_record.request_id,
        audit_record.detail,
    ]
    return cipher.chain_link(previous + json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def verify(entries: Iterable[Entry], head: tuple[int, bytes], cipher: Cipher) -> Fault | None:
    """Return the first fault of a log, or None if the chain is intact.

    ``entries`` must be sorted by ``seq``; ``head`` is the stored number and link of the last record.
    """
    seq, previous, keyed = 0, START, False
    for entry in entries:
        if entry.seq > seq + 1:
            return Fault(seq + 1, "missing")
        if entry.seq <= seq or entry.seq > head[0]:
            return Fault(entry.seq, "inserted")
        if keyed and not entry.keyed:
            return Fault(entry.seq, "altered")
        keyed = entry.keyed
        expected = link(entry.seq, entry.at, entry.audit_record, previous, cipher if keyed else NO_ENCRYPTION)
        if expected != entry.link:
            return Fault(entry.seq, "altered")
        seq, previous = entry.seq, entry.link
    if seq < head[0]:
        return Fault(seq + 1, "missing")
    return None if previous == head[1] else Fault(seq, "altered")
