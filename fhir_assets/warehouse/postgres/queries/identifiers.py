"""The column ``fhir.resource.identifiers``: finds resources by identifier, and resources that refer to others by one.

Loads record the identifiers of a resource only if conditional references name its type. ``ops.identifier_types``
contains these types. ``complete`` states that all loaded resources of the type have their identifiers; ``tokens``
identifies the rules and the key with which they were hashed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256

from fhir_assets.fhir.conditional_references import UNIDENTIFIED, WAITING
from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of
from fhir_assets.warehouse.postgres.resources import decrypt_resource

_REVISION = "1"
"""Increase this number whenever identifiers are hashed to other tokens."""

_ROWS_PER_BATCH = 500


@dataclass(frozen=True, slots=True)
class LockedResource:
    """A stored resource whose row is locked, with its decrypted JSON."""

    id: str
    partition_key: str
    arrived: datetime
    body: bytes


@dataclass(frozen=True, slots=True)
class ResolvedResource:
    """The changed values in the row of a resource whose conditional references were resolved; None: unchanged."""

    id: str
    identifiers: Sequence[str]
    keyless: Sequence[str]
    patients: Sequence[str] | None
    mentions: Sequence[str] | None


def identify_tokens(conn: Session) -> str:
    """Return a text that changes with the rules and the key by which identifiers are hashed."""
    return f"{_REVISION}-{sha256(cipher_of(conn).fingerprint(b'identifiers')).hexdigest()[:16]}"


def hold_type(conn: Session, resource_type: str) -> bool:
    """Return whether resources of a type are loaded with their identifiers.

    The answer is valid until the transaction ends.
    """
    conn.execute(
        "SELECT pg_advisory_xact_lock_shared(%s, hashtext(%s))", [advisory_locks.IDENTIFIER_TYPE, resource_type]
    )
    row = conn.execute(
        """
        SELECT EXISTS (
            SELECT FROM ops.identifier_types
            WHERE source = ops.current_source() AND resource_type = %s AND tokens = %s
        )
        """,
        [resource_type, identify_tokens(conn)],
    ).fetchone()
    return bool(row and row[0])


def are_used(conn: Connection) -> bool:
    """Return whether conditional references have been found."""
    row = conn.execute(
        "SELECT EXISTS (SELECT FROM ops.identifier_types WHERE source = ops.current_source())"
    ).fetchone()
    return bool(row and row[0])


def is_complete(conn: Session, resource_type: str) -> bool:
    """Return whether all loaded resources of a type have their identifiers."""
    row = conn.execute(
        """
        SELECT EXISTS (
            SELECT FROM ops.identifier_types
            WHERE source = ops.current_source() AND resource_type = %s AND tokens = %s AND complete
        )
        """,
        [resource_type, identify_tokens(conn)],
    ).fetchone()
    return bool(row and row[0])


def add_type(conn: Session, resource_type: str) -> bool:
    """Make all later transactions load a type with its identifiers. Call it in a transaction of its own.

    Return False and change nothing while another transaction loads the type, because waiting for it would block other
    loads.
    """
    row = conn.execute(
        "SELECT pg_try_advisory_xact_lock(%s, hashtext(%s))", [advisory_locks.IDENTIFIER_TYPE, resource_type]
    ).fetchone()
    if not row or not row[0]:
        return False
    tokens = identify_tokens(conn)
    conn.execute(
        """
        INSERT INTO ops.identifier_types AS known (resource_type, tokens)
        VALUES (%s, %s)
        ON CONFLICT (resource_type, source) DO UPDATE SET tokens = excluded.tokens, complete = false
        WHERE known.tokens <> excluded.tokens
        """,
        [resource_type, tokens],
    )
    return True


def mark_outdated_tokens(conn: Session) -> None:
    """Mark all resources with conditions to be examined, if identifiers were hashed by other rules or with another
    key.
    """
    removed = conn.execute(
        "DELETE FROM ops.identifier_types WHERE source = ops.current_source() AND tokens <> %s", [identify_tokens(conn)]
    ).rowcount
    if removed:
        conn.execute(
            """
            UPDATE fhir.resource r
            SET identifiers = CASE WHEN EXISTS (
                SELECT FROM unnest(r.identifiers) i WHERE starts_with(i, '?')
            ) THEN ARRAY['?', '-'] END
            WHERE source = ops.current_source() AND identifiers IS NOT NULL
            """
        )


def lock_unidentified(conn: Session, resource_type: str, after: str, limit: int) -> list[LockedResource]:
    """Lock and return the next resources of a type whose identifiers are not known, by id. Locked rows are skipped.

    Raises EncryptionError.
    """
    rows = conn.execute(
        """
        SELECT
            id, partition_key, coalesce(arrived, as_of),
            CASE WHEN key_id IS NULL THEN resource::text ELSE resource #>> '{}' END, key_id
        FROM fhir.resource
        WHERE source = ops.current_source()
            AND resource_type = %s AND id > %s
            AND (identifiers IS NULL OR identifiers @> %s)
            AND resource IS NOT NULL
        ORDER BY id
        LIMIT %s
        FOR UPDATE SKIP LOCKED
        """,
        [resource_type, after, [UNIDENTIFIED], limit],
    ).fetchall()
    return _decrypt(conn, resource_type, rows)


def set_identifiers(conn: Connection, resource_type: str, identifiers: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Store the tokens of resources, given by id, in addition to their conditions. The rows must be locked."""
    with conn.cursor() as cursor:
        cursor.executemany(
            """
            UPDATE fhir.resource
            SET identifiers = %s::text[] || array_remove(identifiers, '-')
            WHERE source = ops.current_source() AND resource_type = %s AND id = %s
            """,
            [(list(found), resource_type, resource_id) for resource_id, found in identifiers],
        )


def mark_complete(conn: Connection, resource_type: str) -> bool:
    """Mark a type as complete if all of its resources have their identifiers. Return whether they have."""
    return bool(
        conn.execute(
            """
            UPDATE ops.identifier_types
            SET complete = true
            WHERE source = ops.current_source()
                AND resource_type = %(type)s
                AND NOT EXISTS (
                    SELECT FROM fhir.resource
                    WHERE source = ops.current_source()
                        AND resource_type = %(type)s
                        AND (identifiers IS NULL OR identifiers @> '{-}')
                        AND resource IS NOT NULL
                )
            """,
            {"type": resource_type},
        ).rowcount
    )


def find_waiting_types(conn: Connection) -> list[str]:
    """Return the types of the resources that have unresolved conditional references."""
    rows = conn.execute(
        """
        SELECT DISTINCT resource_type
        FROM fhir.resource
        WHERE source = ops.current_source() AND identifiers @> %s
        ORDER BY resource_type
        """,
        [[WAITING]],
    )
    return [name for (name,) in rows]


def stream_waiting(conn: Connection, resource_type: str) -> Iterator[tuple[list[str], set[str]]]:
    """Yield the ids of resources with unresolved references, in batches ordered by id, with all of their conditions.

    The conditions are empty if they are not known yet. ``conn`` is in a transaction until the iterator is closed.
    """
    with closing(conn.cursor(name="waiting")) as cursor:
        cursor.execute(
            """
            SELECT id, identifiers
            FROM fhir.resource
            WHERE source = ops.current_source() AND resource_type = %s AND identifiers @> %s
            ORDER BY id COLLATE "C"
            """,
            [resource_type, [WAITING]],
        )
        while rows := cursor.fetchmany(_ROWS_PER_BATCH):
            conditions = {
                token for _, found in rows for token in found if token.startswith(WAITING) and token != WAITING
            }
            yield [resource_id for resource_id, _ in rows], conditions


def find_conditions(conn: Connection, resource_type: str, ids: Sequence[str]) -> dict[str, list[str]]:
    """Return the conditions of those of the resources that have any, by id."""
    rows = conn.execute(
        """
        SELECT id, ARRAY(SELECT i FROM unnest(identifiers) i WHERE starts_with(i, '?') AND i <> '?')
        FROM fhir.resource
        WHERE source = ops.current_source()
            AND resource_type = %s AND id = ANY(%s)
            AND identifiers IS NOT NULL
            AND EXISTS (SELECT FROM unnest(identifiers) i WHERE starts_with(i, '?'))
        """,
        [resource_type, list(ids)],
    )
    return dict(rows.fetchall())


def mark_waiting(conn: Connection, resource_type: str, ids: Sequence[str]) -> None:
    """Mark resources whose references have lost their target, so that the next load resolves them."""
    if ids:
        conn.execute(
            """
            UPDATE fhir.resource
            SET identifiers = identifiers || ARRAY['?']
            WHERE source = ops.current_source()
                AND resource_type = %s AND id = ANY(%s)
                AND NOT identifiers @> ARRAY['?']
            """,
            [resource_type, list(ids)],
        )


def find_targets(conn: Session, conditions: Iterable[str]) -> dict[str, str]:
    """Return the ids of the targets of conditions. A condition that several resources meet has no target."""
    rows = conn.execute(
        """
        SELECT c.condition, min(target.id)
        FROM unnest(%s::text[]) c (condition)
        JOIN ops.identifier_types t
            ON t.source = ops.current_source()
            AND t.resource_type = substr(split_part(c.condition, '#', 1), 2)
            AND t.complete
            AND t.tokens = %s
        CROSS JOIN LATERAL (
            SELECT r.id
            FROM fhir.resource r
            WHERE r.source = ops.current_source()
                AND r.resource_type = t.resource_type
                AND r.identifiers && ARRAY['#' || split_part(c.condition, '#', 2)]
                AND r.resource IS NOT NULL
            LIMIT 2
        ) target
        GROUP BY c.condition
        HAVING count(*) = 1
        """,
        [sorted(set(conditions)), identify_tokens(conn)],
    )
    return dict(rows.fetchall())


def lock_waiting(
    conn: Session, resource_type: str, ids: Sequence[str], targets: Mapping[str, str]
) -> list[LockedResource]:
    """Lock and return those of the resources that wait for ``targets``, or whose conditions are not known.

    Rows that others have locked are left out. Raises EncryptionError.
    """
    rows = conn.execute(
        """
        SELECT
            id, partition_key, coalesce(arrived, as_of),
            CASE WHEN key_id IS NULL THEN resource::text ELSE resource #>> '{}' END, key_id
        FROM fhir.resource
        WHERE source = ops.current_source()
            AND resource_type = %s AND id = ANY(%s)
            AND identifiers @> %s
            AND (
                identifiers && %s
                OR NOT EXISTS (SELECT FROM unnest(identifiers) i WHERE starts_with(i, '?') AND i <> '?')
            )
            AND resource IS NOT NULL
        ORDER BY id COLLATE "C"
        FOR UPDATE SKIP LOCKED
        """,
        [resource_type, list(ids), [WAITING], list(targets)],
    ).fetchall()
    return _decrypt(conn, resource_type, rows)


def store_resolved(conn: Connection, resource_type: str, resources: Iterable[ResolvedResource]) -> None:
    """Store the targets of the resolved references of resources. The rows must be locked."""
    with conn.cursor() as cursor:
        cursor.executemany(
            """
            UPDATE fhir.resource
            SET identifiers = %s, keyless = %s, patients = coalesce(%s, patients), mentions = coalesce(%s, mentions)
            WHERE source = ops.current_source() AND resource_type = %s AND id = %s
            """,
            [
                (
                    list(resource.identifiers),
                    list(resource.keyless),
                    None if resource.patients is None else list(resource.patients),
                    None if resource.mentions is None else list(resource.mentions),
                    resource_type,
                    resource.id,
                )
                for resource in resources
            ],
        )


def _decrypt(
    conn: Session, resource_type: str, rows: Iterable[tuple[str, str, datetime, str, str | None]]
) -> list[LockedResource]:
    return [
        LockedResource(
            resource_id, partition_key, arrived, decrypt_resource(conn, resource_type, resource_id, text, key_id)
        )
        for resource_id, partition_key, arrived, text, key_id in rows
    ]
