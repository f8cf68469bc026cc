"""Reads resources from ``fhir.resource``, decrypted, as the bytes that were loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import sql

from fhir_assets.privacy.encryption import Cipher, from_json
from fhir_assets.privacy.places import Place, resource_place
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of

_ROWS_PER_FETCH = 500


@dataclass(frozen=True, slots=True)
class StoredResource:
    """The newest version of a resource in the tables; ``body`` is its JSON."""

    resource_type: str
    id: str
    version_id: str | None
    last_updated: datetime | None
    partition_key: str
    body: bytes
    created_at: datetime | None
    """When a version was first loaded; None if that was before this was recorded."""


COLUMNS = sql.SQL("""
    resource_type, id, version_id, last_updated, partition_key,
    CASE WHEN key_id IS NULL THEN resource::text ELSE resource #>> '{}' END, key_id, created_at
""")
"""The columns of ``fhir.resource`` that ``decrypt_row`` takes."""


def decrypt_row(conn: Session, row: Sequence[Any]) -> StoredResource:
    """Return the resource in a row of COLUMNS. Raises EncryptionError."""
    resource_type, resource_id, version_id, last_updated, partition_key, text, key_id, created_at = row
    body = decrypt_resource(conn, resource_type, resource_id, text, key_id)
    return StoredResource(resource_type, resource_id, version_id, last_updated, partition_key, body, created_at)


def decrypt_resource(conn: Session, resource_type: str, resource_id: str, text: str, key_id: str | None) -> bytes:
    """Return the JSON of a resource of the session's source from the text of its column.

    It is encrypted unless ``key_id`` is None. Raises EncryptionError, also if the text belongs to another resource.
    """
    return decrypt_text(text, key_id, cipher_of(conn), resource_place(conn.source, resource_type, resource_id))


def decrypt_text(text: str, key_id: str | None, cipher: Cipher, place: Place) -> bytes:
    """Return the JSON from the text of a column, which is encrypted unless ``key_id`` is None.

    Raises EncryptionError.
    """
    if key_id is None:
        cipher.check_unbound(place)
        return text.encode()
    return cipher.decrypt_and_decompress(from_json(text), place)


def read(conn: Session, resource_type: str, resource_id: str) -> StoredResource | None:
    """Return a resource, or None if the tables do not contain it. Raises EncryptionError."""
    row = conn.execute(
        sql.SQL("""
            SELECT {}
            FROM fhir.resource
            WHERE source = ops.current_source()
                AND resource_type = %s AND id = %s AND resource IS NOT NULL
        """).format(COLUMNS),
        [resource_type, resource_id],
    ).fetchone()
    return None if row is None else decrypt_row(conn, row)


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """The version of a resource in the tables.

    Its time in the order of versions is ``last_updated`` (None if it does not count) or ``arrived`` (None if it is not
    known).
    """

    last_updated: datetime | None
    arrived: datetime | None
    partition_key: str

    def is_version(self, last_updated: datetime | None, arrived: datetime | None, partition_key: str) -> bool:
        """Return whether a resource of a part with these values is this version."""
        if last_updated is not None or self.last_updated is not None:
            return last_updated == self.last_updated
        if arrived is not None and self.arrived is not None:
            return arrived == self.arrived
        return partition_key == self.partition_key


def find_versions(conn: Connection, resource_type: str, ids: Sequence[str]) -> dict[str, StoredVersion]:
    """Return the stored versions, by id, of the resources among ``ids`` that the tables contain."""
    rows = conn.execute(
        """
        SELECT id, last_updated, arrived, partition_key
        FROM fhir.resource
        WHERE source = ops.current_source()
            AND resource_type = %s AND id = ANY(%s) AND resource IS NOT NULL
        """,
        [resource_type, list(ids)],
    )
    return {resource_id: StoredVersion(*version) for resource_id, *version in rows}


def count_by_window(
    conn: Connection, resource_type: str, *, partition_keys: Sequence[str] | None = None
) -> dict[str, int]:
    """Return the number of resources of a type in the tables by partition key: all, or those of ``partition_keys``."""
    rows = conn.execute(
        """
        SELECT partition_key, count(*)
        FROM fhir.resource
        WHERE source = ops.current_source()
            AND resource_type = %(type)s
            AND resource IS NOT NULL
            AND (%(keys)s::text[] IS NULL OR partition_key = ANY(%(keys)s))
        GROUP BY 1
        """,
        {"type": resource_type, "keys": None if partition_keys is None else list(partition_keys)},
    )
    return dict(rows.fetchall())


def stream_patient(conn: Session, patient_id: str) -> Iterator[StoredResource]:
    """Stream all resources of a patient's compartment, the Patient first. Raises EncryptionError."""
    query = sql.SQL("""
        SELECT {}
        FROM fhir.resource
        WHERE source = ops.current_source()
            AND (patients[1] = %(id)s OR (cardinality(patients) > 1 AND patients @> ARRAY[%(id)s::text]))
            AND resource IS NOT NULL
        ORDER BY resource_type <> 'Patient', resource_type, id
    """).format(COLUMNS)
    yield from _stream(conn, query, {"id": patient_id})


def stream_type(
    conn: Session, resource_type: str, *, partition_keys: Sequence[str] | None = None
) -> Iterator[StoredResource]:
    """Stream the resources of a type sorted by id: all, or those of ``partition_keys``.

    Raises EncryptionError.
    """
    query = sql.SQL("""
        SELECT {}
        FROM fhir.resource
        WHERE source = ops.current_source()
            AND resource_type = %(type)s AND resource IS NOT NULL {}
        ORDER BY id
    """).format(COLUMNS, sql.SQL("" if partition_keys is None else "AND partition_key = ANY(%(keys)s)"))
    yield from _stream(conn, query, {"type": resource_type, "keys": partition_keys and list(partition_keys)})


def _stream(conn: Session, query: sql.Composed, params: dict[str, object]) -> Iterator[StoredResource]:
    with conn.transaction(), conn.cursor(name="resources") as cursor:
        cursor.itersize = _ROWS_PER_FETCH
        for row in cursor.execute(query, params):
            yield decrypt_row(conn, row)
