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
    "accept a loss",
]

START = bytes(32)
"""The link before the first record."""

MARK = "audit.json"
"""The name of the file in the store that vouches for the end of the audit log."""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One audited action: the actor, the action, the resource and the run or request it belongs to.

    It contains no patient data. ``subject`` names a resource by its keyed hash (``Cipher.subject``); a bulk action has
    only a ``count`` of resources. ``detail`` holds short words and numbers. ``actor`` is verified: the name of an API
    token, the account of the operating system, or the part of the pipeline. ``claim`` is a name that the caller gave,
    which nobody verified.
    """

    action: Action
    actor: str
    resource_type: str | None = None
    subject: str | None = None
    count: int = 1
    run_id: str | None = None
    request_id: str | None = None
    detail: dict[str, str | int | bool | None] = field(default_factory=dict)
    claim: str | None = None


@dataclass(frozen=True, slots=True)
class Writer:
    """Who wrote a record: the login of the session, as Postgres knows it, and the process' account, by its uid."""

    database_user: str
    account: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored audit record with its number and link. ``keyed`` is whether the link is an HMAC made with keys.

    Records of earlier versions have no ``writer``.
    """

    seq: int
    at: datetime
    audit_record: AuditRecord
    writer: Writer | None
    keyed: bool
    link: bytes


@dataclass(frozen=True, slots=True)
class Fault:
    """The first record of the audit log that was altered, is missing or was inserted; or what is wrong with its mark.

    `fhir-assets audit verify --json` prints the fields under these names.
    """

    seq: int
    what: Literal["altered", "missing", "inserted", "unmarked", "mark altered"]

    def __str__(self) -> str:
        if self.what == "unmarked":
            return f"{MARK} of the store, which vouched for the end of ops.audit_log, is missing"
        if self.what == "mark altered":
            return f"{MARK} of the store, which vouches for record {self.seq} of ops.audit_log, has no valid signature"
        return f"record {self.seq} of ops.audit_log is {self.what}"


def link(
    seq: int, at: datetime, audit_record: AuditRecord, writer: Writer | None, previous: bytes, cipher: Cipher
) -> bytes:
    """Return the link of a record, computed from its content and the ``previous`` link."""
    content: list[object] = [
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
    if writer:
        content += [writer.database_user, writer.account, audit_record.claim]
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
        expected = link(
            entry.seq, entry.at, entry.audit_record, entry.writer, previous, cipher if keyed else NO_ENCRYPTION
        )
        if expected != entry.link:
            return Fault(entry.seq, "altered")
        seq, previous = entry.seq, entry.link
    if seq < head[0]:
        return Fault(seq + 1, "missing")
    return None if previous == head[1] else Fault(seq, "altered")
