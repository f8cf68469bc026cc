"""Names of files of a landing zone, in ``ops.landing_files``. Hospitals put names and numbers of patients into them.

With encryption keys, the column ``name`` has a label: ``file-`` and the keyed hash of source, zone and name, which
rotations of the keys do not change. ``encrypted_name`` has the name, bound to its row, and ``key_id`` its key. Without
keys, and in rows of an earlier release, ``name`` has the name, and the others are null.
"""

from collections.abc import Iterable, Sequence

from psycopg import sql

from fhir_assets.errors import EncryptionError
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.privacy.places import landing_name_place
from fhir_assets.warehouse.postgres.db.connections import Connection, Session

IS_NAMED = sql.SQL("(name = ANY(%(labels)s) OR key_id IS NULL AND name = ANY(%(names)s))")
"""The condition for the rows of some files; ``label_names`` returns its parameters."""


def get_label(conn: Session, zone: str, name: str) -> str:
    """Return what the column ``name`` has for a file: its label, or without keys its name."""
    return _build_label(conn.cipher, conn.source, zone, name) if conn.cipher.encrypts else name


def label_names(conn: Session, zone: str, names: Iterable[str]) -> dict[str, object]:
    """Return the parameters of ``IS_NAMED`` for the files with some names."""
    listed = list(names)
    return {"labels": [get_label(conn, zone, name) for name in listed], "names": listed}


def read_name(conn: Session, zone: str, stored: str, encrypted: bytes | None) -> str:
    """Return the name of a file from the columns ``name`` and ``encrypted_name``. Raises EncryptionError."""
    if encrypted is None:
        return stored
    place = landing_name_place(conn.source, zone, stored)
    return conn.cipher.decrypt(bytes(encrypted), place).decode(*_UTF8)


def read_name_or_label(conn: Session, zone: str, stored: str, encrypted: bytes | None) -> str:
    """Return the name of a file, or its label if the name cannot be decrypted."""
    try:
        return read_name(conn, zone, stored, encrypted)
    except EncryptionError:
        return stored


def encrypt_name(conn: Session, zone: str, label: str, name: str) -> bytes | None:
    """Return what the column ``encrypted_name`` has for a file; None without keys."""
    return _encrypt(conn.cipher, conn.source, zone, label, name) if conn.cipher.encrypts else None


FileKey = tuple[str, str, str]
"""Source, zone and stored name of a file: the primary key of ``ops.landing_files``."""


def find_clear(conn: Connection, *, after: Sequence[str], limit: int) -> list[FileKey]:
    """Return the keys after ``after`` of rows whose names are in the clear, of all sources and zones."""
    return conn.execute(
        """
        SELECT source, zone, name
        FROM ops.landing_files
        WHERE key_id IS NULL AND (source, zone, name) > (%s, %s, %s)
        ORDER BY source, zone, name
        LIMIT %s
        """,
        [*after, limit],
    ).fetchall()


def encrypt_zone(conn: Session, zone: str) -> None:
    """Encrypt all names of a zone that are in the clear."""
    rows = conn.execute(
        "SELECT source, zone, name FROM ops.landing_files"
        " WHERE source = ops.current_source() AND zone = %s AND key_id IS NULL",
        [zone],
    ).fetchall()
    if rows:
        encrypt_clear(conn, rows)


def encrypt_clear(conn: Session, keys: Sequence[FileKey], *, skip_locked: bool = False) -> int:
    """Encrypt the names of rows that are in the clear, in the order of their keys. Return the number of rows.

    If a file has a row with a label, too, because a process without keys has recorded it meanwhile, the row in the
    clear is deleted: the zone is scanned again, and content is received once. With ``skip_locked``, rows that another
    transaction has locked stay in the clear.
    """
    query = sql.SQL("""
        SELECT source, zone, name
        FROM ops.landing_files
        WHERE key_id IS NULL
            AND (source, zone, name) IN (SELECT * FROM unnest(%s::text[], %s::text[], %s::text[]))
        ORDER BY source, zone, name
        FOR UPDATE {skip}
    """).format(skip=sql.SQL("SKIP LOCKED" if skip_locked else ""))
    cipher = conn.cipher
    rows = []
    for source, zone, name in conn.execute(query, [list(column) for column in zip(*keys, strict=True)]):
        label = _build_label(cipher, source, zone, name)
        encrypted = _encrypt(cipher, source, zone, label, name)
        rows.append({"source": source, "zone": zone, "name": name, "label": label, "encrypted": encrypted})
    with conn.cursor() as cursor:
        cursor.executemany(
            """
            DELETE FROM ops.landing_files
            WHERE source = %(source)s
                AND zone = %(zone)s
                AND name = %(name)s
                AND EXISTS (
                    SELECT FROM ops.landing_files WHERE source = %(source)s AND zone = %(zone)s AND name = %(label)s
                )
            """,
            rows,
        )
        cursor.executemany(
            """
            UPDATE ops.landing_files
            SET name = %(label)s, encrypted_name = %(encrypted)s, key_id = %(key_id)s
            WHERE source = %(source)s AND zone = %(zone)s AND name = %(name)s
            """,
            [{**row, "key_id": cipher.key_id} for row in rows],
        )
    return len(rows)


_UTF8 = ("utf-8", "surrogatepass")


def _build_label(cipher: Cipher, source: str, zone: str, name: str) -> str:
    return f"file-{cipher.hash_file_name(source, zone, name)}"


def _encrypt(cipher: Cipher, source: str, zone: str, label: str, name: str) -> bytes:
    return cipher.encrypt(name.encode(*_UTF8), landing_name_place(source, zone, label))
