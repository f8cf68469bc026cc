"""What becomes of claimed changes: acknowledged, dead, due again later, or given back, in the caller's transaction."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from psycopg.types.json import Jsonb

from fhir_assets.delivery.connector.mapping import Identifier
from fhir_assets.delivery.connector.outbox import Change, Claim, Delivered
from fhir_assets.warehouse.postgres.db.connections import Connection


def defer(conn: Connection, claims: Sequence[Claim], wait: timedelta) -> None:
    """Give claims back that nothing was sent for: due again after ``wait``, and not counted as an attempt."""
    conn.execute(
        "UPDATE health.fhir_outbox SET claimed_by = NULL, attempts = attempts - 1,"
        " next_retry_at = greatest(next_retry_at, clock_timestamp() + %s) WHERE id = ANY(%s)",
        [wait, [c.event_id for c in claims]],
    )


def retry(conn: Connection, waits: Sequence[tuple[Change, float]]) -> None:
    """Give changes back, each due again after so many seconds."""
    later = [(event_id, wait) for change, wait in waits for event_id in change.event_ids]
    conn.execute(
        "UPDATE health.fhir_outbox o SET claimed_by = NULL,"
        " next_retry_at = clock_timestamp() + make_interval(secs => seconds)"
        " FROM unnest(%s::bigint[], %s::float8[]) AS later (id, seconds) WHERE o.id = later.id",
        _columns(later, 2),
    )


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """What the server has taken: ``now`` says where the record is, None after a deletion."""

    change: Change
    outcome: str
    now: Delivered | None


def acknowledge(conn: Connection, done: Sequence[Acknowledged]) -> None:
    """Settle changes that the server has taken: processed, remembered, and open dead letters of theirs superseded.

    Belongs in one transaction.
    """
    _mark_processed(conn, [each.change for each in done])
    events = [
        (a.change.claim.source, a.change.claim.record_id, txid, a.outcome, a.change.claim.attempts)
        for a in done
        for txid in a.change.txids
    ]
    conn.execute(
        "INSERT INTO health.fhir_processed_event (source, record_id, txid, outcome, attempts)"
        " SELECT a, b, c::xid8, d, e FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::int[])"
        " AS new (a, b, c, d, e) ON CONFLICT DO NOTHING",
        _columns(events, 5),
    )
    sources, records = _columns([(a.change.claim.source, a.change.claim.record_id) for a in done], 2)
    places = _columns([(a.now.resource_id if a.now else None,) for a in done], 1)[0]
    conn.execute(
        "DELETE FROM health.fhir_delivered d USING unnest(%s::text[], %s::text[]) AS gone (s, r)"
        " WHERE d.source = s AND d.record_id = r",
        [sources, records],
    )
    conn.execute(
        "DELETE FROM health.fhir_delivered d USING unnest(%s::text[], %s::text[]) AS taken (s, id)"
        " WHERE d.source = s AND d.resource_id = id",
        [sources, places],
    )
    held = [
        (a.change.claim.source, a.change.claim.record_id, a.now.resource_id, *_pair(a.now.identifier))
        for a in done
        if a.now
    ]
    conn.execute(
        "INSERT INTO health.fhir_delivered (source, record_id, resource_id, identifier_system, identifier_value)"
        " SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[]) ON CONFLICT DO NOTHING",
        _columns(held, 5),
    )
    conn.execute(
        "UPDATE health.fhir_dlq q SET status = 'superseded', settled_at = clock_timestamp()"
        " FROM unnest(%s::text[], %s::text[]) AS new (s, r)"
        " WHERE q.source = s AND q.record_id = r AND q.status = 'open'",
        [sources, records],
    )


@dataclass(frozen=True, slots=True)
class Refused:
    """A change that the server will not take, or that cannot be made into a resource."""

    change: Change
    reason: str
    message: str
    http_status: int | None


def bury(conn: Connection, refused: Sequence[Refused]) -> None:
    """Move changes to the dead letters. Belongs in one transaction."""
    _mark_processed(conn, [each.change for each in refused])
    with conn.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO health.fhir_dlq (source, record_id, txids, formers, reason, message, http_status, attempts,"
            " first_change_at) VALUES (%s, %s, %s::text[]::xid8[], %s, %s, %s, %s, %s, %s)",
            [
                (
                    r.change.claim.source,
                    r.change.claim.record_id,
                    r.change.txids,
                    Jsonb([_pair(former) for former in r.change.formers]),
                    r.reason,
                    r.message,
                    r.http_status,
                    r.change.claim.attempts,
                    r.change.first_change_at,
                )
                for r in refused
            ],
        )


def prune(conn: Connection, keep: timedelta, limit: int = 10_000) -> int:
    """Forget processed events older than ``keep``, at most ``limit`` of each table. Returns how many of the outbox."""
    conn.execute(
        "DELETE FROM health.fhir_processed_event WHERE ctid = ANY(ARRAY(SELECT ctid FROM health.fhir_processed_event"
        " WHERE processed_at < now() - %s LIMIT %s))",
        [keep, limit],
    )
    return conn.execute(
        "DELETE FROM health.fhir_outbox WHERE id IN (SELECT id FROM health.fhir_outbox"
        " WHERE processed_at < now() - %s LIMIT %s)",
        [keep, limit],
    ).rowcount


def _mark_processed(conn: Connection, changes: Sequence[Change]) -> None:
    conn.execute(
        "UPDATE health.fhir_outbox SET processed_at = clock_timestamp(), claimed_by = NULL WHERE id = ANY(%s)",
        [[event_id for change in changes for event_id in change.event_ids]],
    )


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(width)]


def _pair(identifier: Identifier) -> tuple[str, str]:
    return identifier.system, identifier.value
