"""Records the contents that are about to be sent, and the outcomes of claimed changes.

A change is acknowledged, refused, retried later or released. Functions run in the caller's transaction. Claiming
changes is in ``outbox``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from psycopg.types.json import Jsonb

from fhir_assets.delivery.connector.changes import Change, Delivered, Outgoing
from fhir_assets.delivery.connector.mapping import Identifier
from fhir_assets.delivery.connector.outbox import Claim
from fhir_assets.warehouse.postgres.db.connections import Connection


def record_sent(conn: Connection, changes: Sequence[Change]) -> None:
    """Record the contents that are about to be sent. They must be committed before the first request."""
    conn.execute(
        """
        INSERT INTO health.fhir_sent (source, record_id, identifier_system, identifier_value, content_hash)
        SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[])
        ON CONFLICT DO NOTHING
        """,
        _columns(_list_outgoing(changes), 5),
    )


def forget_unsent(conn: Connection, changes: Sequence[Change]) -> None:
    """Remove the contents that were recorded for this attempt and that the server certainly did not store."""
    unsent = [
        change
        for change in changes
        if isinstance(outgoing := change.outgoing, Outgoing)
        and not outgoing.uncertain
        and all(sent.content_hash != outgoing.content_hash for sent in change.sent)
    ]
    conn.execute(
        """
        DELETE FROM health.fhir_sent s
        USING unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[])
            AS unsent (source, record_id, identifier_system, identifier_value, content_hash)
        WHERE s.source = unsent.source
        AND s.record_id = unsent.record_id
        AND s.identifier_system = unsent.identifier_system
        AND s.identifier_value = unsent.identifier_value
        AND s.content_hash = unsent.content_hash
        """,
        _columns(_list_outgoing(unsent), 5),
    )


def defer(conn: Connection, claims: Sequence[Claim], wait: timedelta) -> None:
    """Release claims for which no request was sent. They are due again after ``wait``, and no attempt is counted."""
    conn.execute(
        """
        UPDATE health.fhir_outbox
        SET claimed_by = NULL,
            attempts = attempts - 1,
            next_retry_at = greatest(next_retry_at, clock_timestamp() + %s)
        WHERE id = ANY(%s)
        """,
        [wait, [claim.event_id for claim in claims]],
    )


def retry(conn: Connection, waits: Sequence[tuple[Change, float]]) -> None:
    """Release changes. Each is due again after its number of seconds."""
    event_waits = [(event_id, wait) for change, wait in waits for event_id in change.event_ids]
    conn.execute(
        """
        UPDATE health.fhir_outbox o
        SET claimed_by = NULL,
            next_retry_at = clock_timestamp() + make_interval(secs => seconds)
        FROM unnest(%s::bigint[], %s::float8[]) AS waiting (id, seconds)
        WHERE o.id = waiting.id
        """,
        _columns(event_waits, 2),
    )


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A change that the server accepted. ``delivered`` is the record's resource on the server; None if it has none."""

    change: Change
    outcome: str
    delivered: Delivered | None


def acknowledge(conn: Connection, done: Sequence[Acknowledged]) -> None:
    """Mark changes as processed, record their resources, and supersede open dead letters of their records."""
    _mark_processed(conn, [acknowledged.change for acknowledged in done])
    events = [
        (a.change.claim.source, a.change.claim.record_id, txid, a.outcome, a.change.claim.attempts)
        for a in done
        for txid in a.change.txids
    ]
    conn.execute(
        """
        INSERT INTO health.fhir_processed_event (source, record_id, txid, outcome, attempts)
        SELECT source, record_id, txid::xid8, outcome, attempts
        FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::int[])
            AS processed (source, record_id, txid, outcome, attempts)
        ON CONFLICT DO NOTHING
        """,
        _columns(events, 5),
    )
    sources, records = _columns([(a.change.claim.source, a.change.claim.record_id) for a in done], 2)
    resource_ids = [a.delivered.resource_id if a.delivered else None for a in done]
    conn.execute(
        """
        DELETE FROM health.fhir_delivered d
        USING unnest(%s::text[], %s::text[]) AS acknowledged (source, record_id)
        WHERE d.source = acknowledged.source AND d.record_id = acknowledged.record_id
        """,
        [sources, records],
    )
    conn.execute(
        """
        DELETE FROM health.fhir_delivered d
        USING unnest(%s::text[], %s::text[]) AS acknowledged (source, resource_id)
        WHERE d.source = acknowledged.source AND d.resource_id = acknowledged.resource_id
        """,
        [sources, resource_ids],
    )
    delivered_rows = [
        (a.change.claim.source, a.change.claim.record_id, *_list_columns(a.delivered)) for a in done if a.delivered
    ]
    conn.execute(
        """
        INSERT INTO health.fhir_delivered (
            source, record_id, resource_id, identifier_system, identifier_value, server, version_id, sent_hash,
            stored_hash
        )
        SELECT *
        FROM unnest(
            %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[]
        )
        ON CONFLICT DO NOTHING
        """,
        _columns(delivered_rows, 9),
    )
    conn.execute(
        """
        DELETE FROM health.fhir_sent s
        USING unnest(%s::text[], %s::text[]) AS acknowledged (source, record_id)
        WHERE s.source = acknowledged.source AND s.record_id = acknowledged.record_id
        """,
        [sources, records],
    )
    conn.execute(
        """
        UPDATE health.fhir_dlq q
        SET status = 'superseded', settled_at = clock_timestamp()
        FROM unnest(%s::text[], %s::text[]) AS acknowledged (source, record_id)
        WHERE q.source = acknowledged.source AND q.record_id = acknowledged.record_id AND q.status = 'open'
        """,
        [sources, records],
    )


@dataclass(frozen=True, slots=True)
class Refused:
    """A change that the server refused, or whose row has no valid resource."""

    change: Change
    reason: str
    message: str
    http_status: int | None


def record_dead_letters(conn: Connection, refused: Sequence[Refused]) -> None:
    """Move changes to the dead letters."""
    _mark_processed(conn, [refusal.change for refusal in refused])
    with conn.cursor() as cursor:
        cursor.executemany(
            """
            INSERT INTO health.fhir_dlq
                (source, record_id, txids, formers, reason, message, http_status, attempts, first_change_at)
            VALUES (%s, %s, %s::text[]::xid8[], %s, %s, %s, %s, %s, %s)
            """,
            [
                (
                    r.change.claim.source,
                    r.change.claim.record_id,
                    r.change.txids,
                    Jsonb([_pair(former) for former in r.change.former_identifiers]),
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
    """Delete processed events older than ``keep``, at most ``limit`` from each table.

    Return the number of rows that were deleted from the outbox.
    """
    conn.execute(
        """
        DELETE FROM health.fhir_processed_event
        WHERE ctid = ANY(ARRAY(
            SELECT ctid FROM health.fhir_processed_event WHERE processed_at < now() - %s LIMIT %s
        ))
        """,
        [keep, limit],
    )
    return conn.execute(
        """
        DELETE FROM health.fhir_outbox
        WHERE id IN (SELECT id FROM health.fhir_outbox WHERE processed_at < now() - %s LIMIT %s)
        """,
        [keep, limit],
    ).rowcount


def _mark_processed(conn: Connection, changes: Sequence[Change]) -> None:
    conn.execute(
        """
        UPDATE health.fhir_outbox
        SET processed_at = clock_timestamp(), claimed_by = NULL
        WHERE id = ANY(%s)
        """,
        [[event_id for change in changes for event_id in change.event_ids]],
    )


def _list_outgoing(changes: Sequence[Change]) -> list[tuple[str, ...]]:
    return [
        (change.claim.source, change.claim.record_id, *_pair(outgoing.identifier), outgoing.content_hash)
        for change in changes
        if isinstance(outgoing := change.outgoing, Outgoing)
    ]


def _list_columns(delivered: Delivered) -> tuple[str | None, ...]:
    return (
        delivered.resource_id,
        *_pair(delivered.identifier),
        delivered.server,
        delivered.version_id,
        delivered.sent_hash,
        delivered.stored_hash,
    )


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(width)]


def _pair(identifier: Identifier) -> tuple[str, str]:
    return identifier.system, identifier.value
