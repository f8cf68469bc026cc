"""``ops.corrections``: resources that a person corrected. The key is the fingerprint of the dead letter.

A correction replaces the original resource whenever that resource is validated again: in a replay, or when its window
is materialized again. Dead letters themselves are in the module ``dead_letters``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from fhir_assets.privacy.encryption import Cipher
from fhir_assets.privacy.places import correction_place
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session, cipher_of


@dataclass(frozen=True, slots=True)
class Correction:
    """The resource that replaces the resource of a dead letter, with the author and the time of the correction."""

    resource: bytes
    corrected_by: str
    corrected_at: datetime


def record(conn: Session, dead_letter_id: int, resource: bytes, *, by: str) -> None:
    """Record ``resource`` as the correction of a dead letter.

    An earlier correction is overwritten; the original resource is kept. ``by`` names the author.
    """
    cipher = cipher_of(conn)
    # The lock keeps the fingerprint, which a key rotation may replace, until the correction is recorded.
    row = conn.execute(
        "SELECT source, fingerprint FROM ops.dead_letters WHERE id = %s FOR SHARE", [dead_letter_id]
    ).fetchone()
    if row is None:
        return
    encrypted = cipher.compress_and_encrypt(resource, correction_place(row[0], bytes(row[1])))
    conn.execute(
        """
        INSERT INTO ops.corrections
            (source, fingerprint, resource_type, stage, partition_key, original, resource, key_id, corrected_by)
        SELECT source, fingerprint, resource_type, stage, partition_key, resource, %(resource)s, %(key)s, %(by)s
        FROM ops.dead_letters
        WHERE id = %(id)s
        ON CONFLICT (fingerprint, source) DO UPDATE SET
            resource = excluded.resource,
            key_id = excluded.key_id,
            corrected_by = excluded.corrected_by,
            corrected_at = now()
        """,
        {"id": dead_letter_id, "resource": encrypted, "key": cipher.key_id, "by": by},
    )


def get(conn: Session, dead_letter_id: int) -> Correction | None:
    """Return the correction of a dead letter, or None if it has none. Raises EncryptionError."""
    row = conn.execute(
        """
        SELECT c.corrected_by, c.corrected_at, source, fingerprint, c.resource
        FROM ops.corrections c
        JOIN ops.dead_letters d USING (fingerprint, source)
        WHERE d.id = %s
        """,
        [dead_letter_id],
    ).fetchone()
    return None if row is None else Correction(decrypt_content(conn, *row[2:]), row[0], row[1])


def decrypt_content(conn: Session, source: str, fingerprint: bytes, resource: bytes) -> bytes:
    """Return the decrypted resource of a row of ``ops.corrections``. Raises EncryptionError."""
    return cipher_of(conn).decrypt_and_decompress(bytes(resource), correction_place(source, bytes(fingerprint)))


def read_by_fingerprint(
    conn: Session, resource_type: str, stages: Sequence[str], partition_keys: Sequence[str]
) -> dict[str, dict[bytes, bytes]]:
    """Return the corrected resources as ``{partition key: {fingerprint: resource}}``. Raises EncryptionError."""
    resources: dict[str, dict[bytes, bytes]] = {}
    rows = conn.execute(
        """
        SELECT partition_key, fingerprint, resource
        FROM ops.corrections
        WHERE source = ops.current_source()
            AND resource_type = %s AND stage = ANY(%s) AND partition_key = ANY(%s)
        """,
        [resource_type, list(stages), list(partition_keys)],
    )
    for key, fingerprint, resource in rows:
        content = decrypt_content(conn, conn.source, fingerprint, resource)
        resources.setdefault(key, {})[bytes(fingerprint)] = content
    return resources


class Corrections:
    """The corrections of a resource type in the given stages and partitions.

    All fingerprints are read at the first look-up and kept in memory. The corrected resources are read one by one.
    """

    def __init__(self, connect: OpenSession, resource_type: str, stages: Sequence[str], keys: Sequence[str]) -> None:
        self._connect = connect
        self._scope = [resource_type, list(stages), list(keys)]
        self._fingerprints: dict[str, set[bytes]] | None = None
        self._cipher: Cipher | None = None

    def exist_in(self, partition_key: str) -> bool:
        """Return True if a partition has corrections."""
        return bool(self._get_fingerprints().get(partition_key))

    def find(self, dead_letter: DeadLetter) -> bytes | None:
        """Return the corrected resource of a dead letter, or None if it has none. Raises EncryptionError."""
        if not self.exist_in(dead_letter.partition_key):
            return None
        assert self._cipher is not None
        fingerprint = dead_letter.fingerprint(self._cipher)
        if fingerprint not in self._get_fingerprints()[dead_letter.partition_key]:
            return None
        with self._connect() as conn:
            row = conn.execute(
                "SELECT resource FROM ops.corrections WHERE source = ops.current_source() AND fingerprint = %s",
                [fingerprint],
            ).fetchone()
            return None if row is None else decrypt_content(conn, conn.source, fingerprint, row[0])

    def _get_fingerprints(self) -> dict[str, set[bytes]]:
        if self._fingerprints is None:
            self._fingerprints = {}
            with self._connect() as conn:
                self._cipher = cipher_of(conn)
                rows = conn.execute(
                    """
                    SELECT partition_key, fingerprint
                    FROM ops.corrections
                    WHERE source = ops.current_source()
                        AND resource_type = %s AND stage = ANY(%s) AND partition_key = ANY(%s)
                    """,
                    self._scope,
                )
                for key, fingerprint in rows:
                    self._fingerprints.setdefault(key, set()).add(bytes(fingerprint))
        return self._fingerprints
