"""``ops.audit_log``: the append-only audit log. Records are written in the transaction of the action they describe."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import datetime
from itertools import chain
from typing import Any

from psycopg.types.json import Jsonb

from fhir_assets.accounts import find_account, find_claim
from fhir_assets.privacy.audit import AuditRecord, Entry, Fault, Writer, link, verify
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.sources import DEFAULT_SOURCE
from fhir_assets.warehouse.postgres.db.advisory_locks import AUDIT_MARK
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of

_COLUMNS = (
    "seq, at, action, actor, resource_type, subject, count, run_id, request_id, detail, claim, database_user, account, "
    "keyed, link"
)
_LOG = f"SELECT {_COLUMNS} FROM ops.audit_log"  # noqa: S608


def record(conn: Session, *audit_records: AuditRecord) -> None:
    """Append audit records in the order given. Records with count 0 are ignored.

    Call this as the last statement of the transaction of the action, because other writers of the log wait until that
    transaction ends. An action on many resources is one record with a count. The transaction's commit waits for the
    disk, whatever ``synchronous_commit`` is (a trigger sets it), so that a crash loses no record of what was done.

    The functions of the database that this calls are the only way to append for the group roles: they choose the
    number, and name the session's login.
    """
    counted = [audit_record for audit_record in audit_records if audit_record.count]
    if not counted:
        return
    with conn.transaction() if conn.autocommit else nullcontext():
        head = conn.execute("SELECT seq, link, at, database_user FROM ops.lock_audit_head()").fetchone()
        if head is None or head[0] is None:
            raise AssertionError("ops.audit_head has no row: the audit log was tampered with")
        seq, previous, at, database_user = head
        rows = _link(counted, seq, at, bytes(previous), Writer(database_user, find_account()), cipher_of(conn))
        conn.execute("SELECT ops.append_audit(%s, %s)", [at, Jsonb(rows)])
    if conn.on_audit:
        conn.on_audit(seq + len(rows))


def _link(
    audit_records: Sequence[AuditRecord], seq: int, at: datetime, previous: bytes, writer: Writer, cipher: Cipher
) -> list[dict[str, object]]:
    """Return the rows of records that follow the record ``seq``, each with its link."""
    rows = []
    for number, audit_record in enumerate(audit_records, start=seq + 1):
        claimed = replace(audit_record, claim=find_claim(audit_record.claim))
        previous = link(number, at, claimed, writer, previous, cipher)
        rows.append({**asdict(claimed), "account": writer.account, "keyed": cipher.encrypts, "link": previous.hex()})
    return rows


def hash_subject(conn: Session, resource_type: str, resource_id: str) -> str:
    """Return the keyed hash that stands for a resource of the session's source in the log."""
    qualified = resource_id if conn.source == DEFAULT_SOURCE else f"{conn.source}/{resource_id}"
    return cipher_of(conn).subject(resource_type, qualified)


def find_fault(conn: Session) -> Fault | None:
    """Return the first record that was altered, is missing or was inserted; None if the log is intact."""
    query = f"SELECT h.seq, h.link, l.* FROM ops.audit_head h LEFT JOIN ({_LOG}) l ON true ORDER BY l.seq"  # noqa: S608
    with conn.transaction(), conn.cursor(name="audit") as cursor:
        cursor.itersize = 5000
        # One statement reads the head and the records, so that both come from the same snapshot.
        rows = iter(cursor.execute(query))
        first = next(rows, None)
        if first is None:
            return Fault(1, "missing")
        entries = (_entry(row[2:]) for row in chain([first], rows) if row[2] is not None)
        return verify(entries, (first[0], bytes(first[1])), cipher_of(conn))


def check_link(conn: Connection, seq: int, link: str) -> Fault | None:
    """Return a fault if the record ``seq`` is missing or its link differs from ``link``, None otherwise."""
    row = conn.execute("SELECT encode(link, 'hex') FROM ops.audit_log WHERE seq = %s", [seq]).fetchone()
    if row is None:
        return Fault(seq, "missing")
    return None if row[0] == link else Fault(seq, "altered")


def get_head(conn: Connection) -> tuple[int, str]:
    """Return the sequence number and the link of the last record, ``(0, "")`` for an empty log.

    If an operator keeps both values outside the database, ``check_link`` can later prove that no record was removed
    from the end of the log.
    """
    row = conn.execute("SELECT seq, encode(link, 'hex') FROM ops.audit_head").fetchone()
    return (row[0], row[1]) if row else (0, "")


def is_keyed(conn: Connection, seq: int) -> bool:
    """Return whether the link of the record ``seq`` was made with keys."""
    return conn.execute("SELECT FROM ops.audit_log WHERE seq = %s AND keyed", [seq]).fetchone() is not None


def is_marked(conn: Connection) -> bool:
    """Return whether a mark in the store has vouched for the end of the log."""
    return conn.execute("SELECT FROM ops.audit_head WHERE has_mark").fetchone() is not None


def lock_mark(conn: Connection) -> None:
    """Let no other process write the mark until the transaction ends. Raises psycopg.errors.LockNotAvailable."""
    conn.execute("SET LOCAL lock_timeout = '3s'")
    conn.execute("SELECT pg_advisory_xact_lock(%s)", [AUDIT_MARK])


def confirm_mark(conn: Connection) -> None:
    """Record that the mark exists."""
    conn.execute("SELECT ops.confirm_audit_mark()")


def find_latest(
    conn: Connection,
    *,
    limit: int,
    action: str | None = None,
    about: str | None = None,
    run_id: str | None = None,
    since: datetime | None = None,
    before: int | None = None,
) -> list[Entry]:
    """Return at most ``limit`` records, newest first, with ``before`` those with a smaller ``seq``.

    ``about`` is the result of ``hash_subject``.
    """
    rows = conn.execute(
        f"""
        {_LOG}
        WHERE (%(action)s::text IS NULL OR action = %(action)s)
            AND (%(about)s::text IS NULL OR subject = %(about)s)
            AND (%(run)s::text IS NULL OR run_id = %(run)s)
            AND (%(since)s::timestamptz IS NULL OR at >= %(since)s)
            AND (%(before)s::bigint IS NULL OR seq < %(before)s)
        ORDER BY seq DESC
        LIMIT %(limit)s
        """,
        {"action": action, "about": about, "run": run_id, "since": since, "before": before, "limit": limit},
    )
    return [_entry(row) for row in rows]


def _entry(row: tuple[Any, ...]) -> Entry:
    seq, at, action, actor, resource_type, about, count, run_id, request_id, detail, claim, user, account, *link = row
    audit_record = AuditRecord(action, actor, resource_type, about, count, run_id, request_id, detail, claim)
    writer = Writer(user, account) if user is not None else None
    return Entry(seq, at, audit_record, writer, link[0], bytes(link[1]))
