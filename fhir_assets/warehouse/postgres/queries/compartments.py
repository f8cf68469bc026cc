"""Fills the columns ``patients`` and ``mentions`` of resources that were loaded without them.

Loads always fill ``patients``, and ``mentions`` if a consent policy is on. This module fills both for resources that
were loaded or withheld before, and for all resources if the rules that find subjects have changed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import Connection, Session
from fhir_assets.warehouse.postgres.resources import decrypt_resource

TABLES = (sql.Identifier("fhir", "resource"), sql.Identifier("ops", "withheld"))
"""The tables whose resources have subjects."""


@dataclass(frozen=True, slots=True)
class UnassignedResource:
    """A resource without ``mentions``, with its decrypted JSON."""

    resource_type: str
    id: str
    body: bytes


def reset_subjects(conn: Connection) -> None:
    """Clear the subjects of all resources, so that ``lock_unassigned_resources`` returns them."""
    for table in TABLES:
        conn.execute(
            sql.SQL("""
                UPDATE {} SET mentions = NULL WHERE source = ops.current_source() AND mentions IS NOT NULL
            """).format(table)
        )


def lock_unassigned_resources(conn: Session, table: sql.Identifier, limit: int) -> list[UnassignedResource]:
    """Return at most ``limit`` resources without ``mentions``, and lock them until the transaction ends.

    Raises EncryptionError.
    """
    rows = conn.execute(
        sql.SQL("""
            SELECT
                resource_type, id,
                CASE WHEN key_id IS NULL THEN resource::text ELSE resource #>> '{{}}' END,
                key_id
            FROM {}
            WHERE source = ops.current_source()
                AND (mentions IS NULL OR patients IS NULL) AND resource IS NOT NULL
            LIMIT %s
            FOR UPDATE
        """).format(table),
        [limit],
    ).fetchall()
    return [
        UnassignedResource(name, key, decrypt_resource(conn, name, key, text, key_id))
        for name, key, text, key_id in rows
    ]


def set_subjects(
    conn: Connection, table: sql.Identifier, assignments: Iterable[tuple[Sequence[str], Sequence[str], str, str]]
) -> None:
    """Store the subjects of resources, given as tuples of patients, mentions, resource type and resource id."""
    with conn.cursor() as cursor:
        cursor.executemany(
            sql.SQL("""
                UPDATE {}
                SET patients = %s, mentions = %s
                WHERE source = ops.current_source() AND resource_type = %s AND id = %s
            """).format(table),
            [(list(patients), list(mentions), name, key) for patients, mentions, name, key in assignments],
        )
