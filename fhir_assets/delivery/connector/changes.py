"""The changes of claimed records: their rows, and what is known about their resources on the server.

A record owns the resource that ``health.fhir_delivered`` names for it, and those whose content it has sent without an
answer (``health.fhir_sent``). Every other resource is foreign, even if it has the record's identifier.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from psycopg import sql

from fhir_assets.delivery.connector.mapping import Identifier, Source
from fhir_assets.delivery.connector.outbox import Claim, build_sql_parts
from fhir_assets.warehouse.postgres.db.connections import Connection


@dataclass(frozen=True, slots=True)
class Delivered:
    """The resource of a record on the server.

    Attributes:
        resource_id: Its id; None if it is not known.
        identifier: The identifier that it was delivered with.
        server: The base URL of the server; None in rows of earlier releases.
        version_id: The version that the delivery created; None if the server did not name it.
        sent_hash: The hash of the content that was sent; None in rows of earlier releases.
        stored_hash: The hash of the content that the server returned; None if it did not.

    """

    resource_id: str | None
    identifier: Identifier
    server: str | None = None
    version_id: str | None = None
    sent_hash: str | None = None
    stored_hash: str | None = None

    @property
    def hashes(self) -> set[str]:
        """The known hashes of the content that the connector sent and of the content that the server returned."""
        return {content_hash for content_hash in (self.sent_hash, self.stored_hash) if content_hash is not None}


@dataclass(frozen=True, slots=True)
class Sent:
    """A content that was sent, or was about to be sent, and that the server has not acknowledged."""

    identifier: Identifier
    content_hash: str


@dataclass(frozen=True, slots=True)
class Holder:
    """Another record whose resource was delivered with an identifier of this record.

    ``current`` is whether its row still has that identifier.
    """

    resource_id: str | None
    identifier: Identifier
    current: bool
    hashes: frozenset[str]


@dataclass(slots=True)
class Outgoing:
    """The resource of a row, to be sent.

    ``uncertain`` is True if the server may have stored it although no answer arrived.
    """

    identifier: Identifier
    resource: dict[str, Any]
    content_hash: str
    uncertain: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """The current state of a claimed record, and the events that this state includes.

    Attributes:
        claim: The claim of the record.
        event_ids: The ids of the events, in ascending order.
        txids: The ids of the transactions that wrote the events.
        first_change_at: The time of the oldest event.
        row: The row of the main table; None if the row was deleted.
        children: The rows of each child table, by the name of the child in the mapping.
        delivered: The resource that was delivered for the record; None if no delivery is recorded.
        former_identifiers: Identifiers that the events removed from the record.
        contested: Whether the server still has this record's identifier on the resource of another record, because the
            change that removed it from the other record is not delivered yet.
        sent: What was sent for the record without an answer.
        holders: The other records whose resources were delivered with an identifier of this record.
        sent_by_others: What was sent without an answer for other records with an identifier of this record.
        locks: The keys of the advisory locks on the record's identifiers.
        outgoing: The resource to send, or the error that prevents it; None if the row was deleted.

    """

    claim: Claim
    event_ids: list[int]
    txids: list[str]
    first_change_at: datetime
    row: dict[str, Any] | None
    children: dict[str, list[dict[str, Any]]]
    delivered: Delivered | None
    former_identifiers: tuple[Identifier, ...]
    contested: bool
    sent: tuple[Sent, ...] = ()
    holders: tuple[Holder, ...] = ()
    sent_by_others: tuple[Sent, ...] = ()
    locks: frozenset[int] = field(default_factory=frozenset)
    outgoing: Outgoing | Exception | None = None

    def hashes_sent_with(self, identifier: Identifier) -> set[str]:
        """Return the hashes of what was sent for the record with this identifier, without an answer."""
        return {sent.content_hash for sent in self.sent if sent.identifier == identifier}

    def hashes_sent_by_others(self, identifier: Identifier) -> set[str]:
        """Return the hashes of what was sent for other records with this identifier, without an answer."""
        return {sent.content_hash for sent in self.sent_by_others if sent.identifier == identifier}


def read_changes(conn: Connection, source: Source, claims: Sequence[Claim]) -> dict[str, tuple[Change, int | None]]:
    """Read the claimed records in one snapshot.

    Return the change of each record, by record id, with the lock key of the record's current identifier. The key is
    None if the record has no row or no identifier.
    """
    parts = build_sql_parts(conn, source)
    children = [
        sql.SQL("""
            {name},
            coalesce((
                SELECT jsonb_agg(to_jsonb(c) ORDER BY c.{order})
                FROM {table} c
                WHERE c.{key} = record.record_id::{type}
            ), '[]')
        """).format(
            name=sql.Literal(name),
            table=sql.Identifier(*child.table.split(".")),
            key=sql.Identifier(child.key),
            order=sql.Identifier(child.order),
            type=parts["type"],
        )
        for name, child in source.children.items()
    ]
    rows = conn.execute(
        _READ.format(children=sql.SQL(", ").join(children), **parts),
        {"source": source.name, "records": [c.record_id for c in claims]},
    )
    by_record = {c.record_id: c for c in claims}
    changes = {}
    for (
        record_id, ids, txids, since, row, child_rows, former, delivered, contested, sent, holders, others, lock
    ) in rows:  # fmt: skip
        changes[record_id] = (
            Change(
                claim=by_record[record_id],
                event_ids=ids,
                txids=txids,
                first_change_at=since,
                row=row,
                children=child_rows,
                delivered=_read_delivered(delivered) if delivered is not None else None,
                former_identifiers=tuple(Identifier(*identifier) for identifier in former),
                contested=contested,
                sent=_read_sent(sent),
                holders=tuple(_read_holder(holder) for holder in holders),
                sent_by_others=_read_sent(others),
            ),
            lock,
        )
    return changes


def _read_delivered(row: dict[str, Any]) -> Delivered:
    identifier = Identifier(row["identifier_system"], row["identifier_value"])
    names = ("resource_id", "server", "version_id", "sent_hash", "stored_hash")
    return Delivered(identifier=identifier, **{name: row[name] for name in names})


def _read_sent(rows: Sequence[tuple[str, str, str]]) -> tuple[Sent, ...]:
    return tuple(Sent(Identifier(system, value), content_hash) for system, value, content_hash in rows)


def _read_holder(row: dict[str, Any]) -> Holder:
    delivered = _read_delivered(row["delivered"])
    return Holder(delivered.resource_id, delivered.identifier, row["current"], frozenset(delivered.hashes))


_READ = sql.SQL("""
    WITH waiting AS MATERIALIZED (
        SELECT
            record_id,
            array_agg(id ORDER BY id) AS ids,
            array_agg(DISTINCT txid::text) AS txids,
            min(created_at) AS since,
            coalesce(
                jsonb_agg(DISTINCT jsonb_build_array(former_system, former_value))
                    FILTER (WHERE former_value IS NOT NULL),
                '[]'
            ) AS former_identifiers
        FROM health.fhir_outbox
        WHERE source = %(source)s AND processed_at IS NULL AND record_id = ANY(%(records)s)
        GROUP BY record_id
    ),
    record AS MATERIALIZED (
        SELECT
            waiting.*,
            to_jsonb(t) AS source_row,
            health.fhir_clean(t.{system}::text) AS system,
            health.fhir_clean(t.{value}::text) AS value,
            to_jsonb(d) AS delivered,
            d.identifier_system AS delivered_system,
            d.identifier_value AS delivered_value
        FROM waiting
        LEFT JOIN {table} t ON t.{key} = waiting.record_id::{type}
        LEFT JOIN health.fhir_delivered d ON d.source = %(source)s AND d.record_id = waiting.record_id
    ),
    own AS MATERIALIZED (
        SELECT record_id, system, value FROM record
        UNION
        SELECT record_id, delivered_system, delivered_value FROM record
        UNION
        SELECT record.record_id, sent.identifier_system, sent.identifier_value
        FROM record
        JOIN health.fhir_sent sent ON sent.source = %(source)s AND sent.record_id = record.record_id
    )
    SELECT
        record.record_id,
        record.ids,
        record.txids,
        record.since,
        record.source_row,
        jsonb_build_object({children}),
        record.former_identifiers,
        record.delivered,
        EXISTS (
            SELECT FROM health.fhir_outbox removal
            JOIN health.fhir_delivered holder
                ON holder.source = removal.source
                AND holder.record_id = removal.record_id
                AND holder.identifier_system = removal.former_system
                AND holder.identifier_value = removal.former_value
            WHERE removal.processed_at IS NULL
            AND removal.former_value IS NOT NULL
            AND removal.source = %(source)s
            AND removal.former_system = record.system
            AND removal.former_value = record.value
            AND removal.record_id <> record.record_id
        ),
        (
            SELECT coalesce(jsonb_agg(jsonb_build_array(identifier_system, identifier_value, content_hash)), '[]')
            FROM health.fhir_sent sent
            WHERE sent.source = %(source)s AND sent.record_id = record.record_id
        ),
        (
            SELECT coalesce(jsonb_agg(DISTINCT jsonb_build_object(
                'delivered', to_jsonb(holder),
                'current', coalesce(
                    health.fhir_clean(row_of_holder.{system}::text) = holder.identifier_system
                    AND health.fhir_clean(row_of_holder.{value}::text) = holder.identifier_value,
                    false
                )
            )), '[]')
            FROM own
            JOIN health.fhir_delivered holder
                ON holder.source = %(source)s
                AND holder.identifier_system = own.system
                AND holder.identifier_value = own.value
                AND holder.record_id <> record.record_id
            LEFT JOIN {table} row_of_holder ON row_of_holder.{key} = holder.record_id::{type}
            WHERE own.record_id = record.record_id
        ),
        (
            SELECT coalesce(jsonb_agg(jsonb_build_array(own.system, own.value, sent.content_hash)), '[]')
            FROM own
            JOIN health.fhir_sent sent
                ON sent.source = %(source)s
                AND sent.identifier_system = own.system
                AND sent.identifier_value = own.value
                AND sent.record_id <> record.record_id
            WHERE own.record_id = record.record_id
        ),
        hashtext(record.system || '|' || record.value)
    FROM record
""")
