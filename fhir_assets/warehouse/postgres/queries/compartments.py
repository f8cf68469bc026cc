"""Fill the column ``patients`` of ``fhir.resource`` for resources that were loaded without it.

Loads fill the column if a consent policy or encryption is on. This module fills it for the resources that were loaded
before.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of
from fhir_assets.warehouse.postgres.resources import decrypt_text


@dataclass(frozen=True, slots=True)
class UnassignedResource:
    """A resource without ``patients``, with its decrypted JSON."""

    resource_type: str
    id: str
    body: bytes


def lock_unassigned_resources(conn: Session, limit: int) -> list[UnassignedResource]:
    """Return at most ``limit`` resources without ``patients``, and lock them until the transaction ends.

    Raises EncryptionError.
    """
    cipher = cipher_of(conn)
    rows = conn.execute(
        """
        SELECT
            resource_type, id,
            CASE WHEN key_id IS NULL THEN resource::text ELSE resource #>> '{}' END,
            key_id
        FROM fhir.resource
        WHERE source = ops.current_source()
            AND patients IS NULL AND resource IS NOT NULL
        LIMIT %s
        FOR UPDATE
        """,
        [limit],
    ).fetchall()
    return [UnassignedResource(name, key, decrypt_text(text, key_id, cipher)) for name, key, text, key_id in rows]


def set_patients(conn: Connection, assignments: Iterable[tuple[list[str], str, str]]) -> None:
    """Store the patients of resources, given as tuples of patient ids, resource type and resource id."""
    with conn.cursor() as cursor:
        cursor.executemany(
            """
            UPDATE fhir.resource
            SET patients = %s
            WHERE source = ops.current_source() AND resource_type = %s AND id = %s
            """,
            list(assignments),
        )
