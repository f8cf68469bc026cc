"""Keyed fingerprints for dead letters and corrections that were stored before encryption keys were set.

The fingerprint of a dead letter is a hash of its content. A deployment with keys computes a keyed hash, so that no
unkeyed hash of patient data is stored.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from psycopg import sql

from fhir_assets.errors import EncryptionError
from fhir_assets.privacy.encryption import NO_ENCRYPTION, is_bound
from fhir_assets.privacy.places import Place, correction_place, dead_letter_place
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres.db.connections import Session, cipher_of

Fingerprints = tuple[bytes, bytes]
"""The stored fingerprint of a row, and the keyed fingerprint that replaces it."""


def compute_fingerprints(conn: Session, table: str, keys: Sequence[Any]) -> list[Fingerprints]:
    """Return the fingerprints to replace for rows of a table in schema ``ops``; ``keys`` are the rows' keys.

    The list is empty for tables without fingerprints.
    """
    match table:
        case "dead_letters":
            return _compute_for_dead_letters(conn, keys)
        case "corrections":
            return _compute_for_corrections(conn, keys)
    return []


def replace_fingerprints(conn: Session, table: str, fingerprints: Sequence[Fingerprints]) -> None:
    """Replace fingerprints in a table. Fingerprints of dead letters are also replaced in ``ops.corrections``.

    If the same content has failed again in the meantime, a row with the keyed fingerprint exists. The older row then
    gets a derived fingerprint, so that both rows are kept. What is bound to the old fingerprint is bound to the new
    one.
    """
    cipher = cipher_of(conn)
    for name in ("dead_letters", "corrections") if table == "dead_letters" else ("corrections",):
        identifier = sql.Identifier("ops", name)
        select = sql.SQL("SELECT fingerprint FROM {table} WHERE fingerprint = ANY(%s)").format(table=identifier)
        existing = {bytes(value) for (value,) in conn.execute(select, [[keyed for _, keyed in fingerprints]])}
        replacements = {
            stored: cipher.fingerprint(b"again\0" + stored) if keyed in existing else keyed
            for stored, keyed in fingerprints
        }
        bind = _bind_corrections if name == "corrections" else _bind_dead_letters
        bind(conn, replacements)
        with conn.cursor() as cursor:
            cursor.executemany(
                sql.SQL("UPDATE {table} SET fingerprint = %s WHERE fingerprint = %s").format(table=identifier),
                [(replacement, stored) for stored, replacement in replacements.items()],
            )


def _bind_dead_letters(conn: Session, replacements: Mapping[bytes, bytes]) -> None:
    rows = conn.execute(
        "SELECT source, fingerprint, resource FROM ops.dead_letters WHERE fingerprint = ANY(%s) FOR UPDATE",
        [list(replacements)],
    ).fetchall()
    for source, fingerprint, resource in rows:
        stored = bytes(fingerprint)
        old, new = (dead_letter_place(source, value) for value in (stored, replacements[stored]))
        conn.execute(
            "UPDATE ops.dead_letters SET resource = %s WHERE source = %s AND fingerprint = %s",
            [_bind(conn, resource, old, new), source, stored],
        )


def _bind_corrections(conn: Session, replacements: Mapping[bytes, bytes]) -> None:
    rows = conn.execute(
        """
        SELECT source, fingerprint, resource, original
        FROM ops.corrections
        WHERE fingerprint = ANY(%s)
        FOR UPDATE
        """,
        [list(replacements)],
    ).fetchall()
    for source, fingerprint, resource, original in rows:
        stored = bytes(fingerprint)
        contents = [
            _bind(conn, content, place(source, stored), place(source, replacements[stored]))
            for content, place in ((resource, correction_place), (original, dead_letter_place))
        ]
        conn.execute(
            "UPDATE ops.corrections SET resource = %s, original = %s WHERE source = %s AND fingerprint = %s",
            [*contents, source, stored],
        )


def _bind(conn: Session, content: bytes | None, old: Place, new: Place) -> bytes | None:
    """Return bound content bound to another place. Content that is not bound or not readable stays unchanged."""
    if content is None or not is_bound(bytes(content)):
        return content
    cipher = cipher_of(conn)
    try:
        return cipher.encrypt(cipher.decrypt(bytes(content), old), new)
    except EncryptionError:
        return content


def _compute_for_dead_letters(conn: Session, ids: Sequence[int]) -> list[Fingerprints]:
    cipher = cipher_of(conn)
    rows = conn.execute(
        """
        SELECT fingerprint, resource_type, resource_id, stage, rule, path, message, resource, partition_key
        FROM ops.dead_letters
        WHERE id = ANY(%s)
        """,
        [list(ids)],
    )
    return [(bytes(stored), DeadLetter(*fields).fingerprint(cipher)) for stored, *fields in rows]


def _compute_for_corrections(conn: Session, stored_fingerprints: Sequence[bytes]) -> list[Fingerprints]:
    """Compute the fingerprints of corrections whose dead letter is deleted.

    The original in the correction is the content of the deleted dead letter. The fingerprints of all other corrections
    are replaced together with those of their dead letters.
    """
    cipher = cipher_of(conn)
    rows = conn.execute(
        """
        SELECT fingerprint, resource_type, NULL, stage, '', '', '', original, partition_key
        FROM ops.corrections
        WHERE fingerprint = ANY(%s)
        """,
        [list(stored_fingerprints)],
    )
    dead_letters = ((bytes(stored), DeadLetter(*fields)) for stored, *fields in rows)
    return [
        (stored, dead_letter.fingerprint(cipher))
        for stored, dead_letter in dead_letters
        if stored == dead_letter.fingerprint(NO_ENCRYPTION)
    ]
