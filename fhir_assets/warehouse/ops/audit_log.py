"""``ops.audit_log``: the append-only audit log. Records are written in the transaction of the action they describe."""

from contextlib import nullcontext
from datetime import datetime
from itertools import chain
from typing import Any

from psycopg.types.json import Jsonb

from fhir_assets.privacy.audit import AuditRecord, Entry, Fault, link, verify
from fhir_assets.sources import DEFAULT_SOURCE
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of

_COLUMNS = "seq, at, action, actor, resource_type, subject, count, run_id, request_id, detail, keyed, link"
_LOG = f"SELECT {_COLUMNS} FROM ops.audit_log"  # noqa: S608

_LOCK_HEAD = """
    SELECT
        seq,
        link,
        clock_timestamp(),
        CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', true) END
    FROM ops.audit_head
    FOR UPDATE
"""


def record(conn: Session, *audit_records: AuditRecord) -> None:
    """Append audit records in the order given. Records with count 0 are ignored.

    Call this as the last statement of the transaction of the action, because other writers of the log wait until that
    transaction ends. An action on many resources is one record with a count. The transaction's commit waits for the
    disk even where others do not (the embedded Postgres), so that a crash loses no record of what was done.
    """
    counted = [audit_record for audit_record in audit_records if audit_record.count]
    if not counted:
        return
    cipher = cipher_of(conn)
    with conn.transaction() if conn.autocommit else nullcontext():
        head = conn.execute(_LOCK_HEAD).fetchone()
        if head is None:
            raise AssertionError("ops.audit_head has no row: the audit log was tampered with")
        seq, previous, at = head[0], bytes(head[1]), head[2]
        rows = []
        for audit_record in counted:
            seq += 1
            previous = link(seq, at, audit_record, previous, cipher)
            rows.append(
                [
                    seq,
                    at,
                    audit_record.action,
                    audit_record.actor,
                    audit_record.resource_type,
                    audit_record.subject,
                    audit_record.count,
                    audit_record.run_id,
                    audit_record.request_id,
                    Jsonb(audit_record.detail),
                    cipher.encrypts,
                    previous,
                ]
            )
        with conn.cursor() as cursor, cursor.copy(f"COPY ops.audit_log ({_COLUMNS}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        conn.execute("UPDATE ops.audit_head SET seq = %s, link = %s", [seq, previous])


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
    seq, at, action, actor, resource_type, about, count, run_id, request_id, detail, keyed, linked = row
    audit_record = AuditRecord(action, actor, resource_type, about, count, run_id, request_id, detail)
    return Entry(seq, at, audit_record, keyed, bytes(linked))
