"""``ops.encryption``: the secret of the hash keys, sealed with a key of the deployment.

It is the canary too: who cannot open it holds the wrong keys, or has lost the right one, and is told so before
anything is read or written.
"""

from fhir_assets.errors import ConfigurationError, EncryptionError
from fhir_assets.privacy.encryption import Cipher, new_secret
from fhir_assets.warehouse.postgres.db.connections import Connection


def unlock(conn: Connection, cipher: Cipher) -> Cipher:
    """``sealing`` with the secret of this database, which is made when keys are first used here. Commits.

    Raises ConfigurationError if the database is sealed and the keys do not fit, or there are none.
    """
    with conn.transaction():
        sealed = _sealed_secret(conn)
        if sealed is None:
            if not cipher.on:
                return cipher
            conn.execute(
                "INSERT INTO ops.encryption (key_id, secret) VALUES (%s, %s) ON CONFLICT DO NOTHING",
                [cipher.key_id, cipher.encrypt(new_secret())],
            )
            sealed = _sealed_secret(conn)
            assert sealed is not None
    key_id, content = sealed
    if not cipher.on:
        raise ConfigurationError(
            f"This database is sealed with key {key_id}, but PHI_ENCRYPTION_KEYS is not set: set it. "
            "Without that key its patient data cannot be read, only loaded again into a new database"
        )
    try:
        return cipher.with_secret(cipher.decrypt(content))
    except EncryptionError:
        raise ConfigurationError(
            f"This database is sealed with key {key_id}, which PHI_ENCRYPTION_KEYS lacks (there: "
            f"{', '.join(key.id for key in cipher.keys)}): add it as the last key. New keys come before it; "
            "`fhir-assets keys rotate` then makes it dispensable"
        ) from None


def reencrypt(conn: Connection, cipher: Cipher) -> bool:
    """Seal the secret with the newest key. Returns whether it was sealed with another one."""
    with conn.transaction():
        sealed = _sealed_secret(conn, lock=True)
        if sealed is None or sealed[0] == cipher.key_id:
            return False
        conn.execute(
            "UPDATE ops.encryption SET key_id = %s, secret = %s, encrypted_at = now()",
            [cipher.key_id, cipher.encrypt(cipher.decrypt(sealed[1]))],
        )
        return True


def get_key_id(conn: Connection) -> str | None:
    """The id of the key that seals the secret; None before keys are first used."""
    sealed = _sealed_secret(conn)
    return sealed[0] if sealed else None


def _sealed_secret(conn: Connection, *, lock: bool = False) -> tuple[str, bytes] | None:
    row = conn.execute(
        "SELECT key_id, secret FROM ops.encryption FOR UPDATE" if lock else "SELECT key_id, secret FROM ops.encryption"
    ).fetchone()
    return None if row is None else (row[0], bytes(row[1]))
