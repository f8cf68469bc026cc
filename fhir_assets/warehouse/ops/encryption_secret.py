"""``ops.encryption``: the secret of the keyed hashes, encrypted with a key of the deployment.

``unlock`` also checks the keys: a deployment with wrong or missing keys fails before it reads or writes any data.
"""

from fhir_assets.errors import ConfigurationError, EncryptionError
from fhir_assets.privacy.encryption import BOUND, Cipher, new_secret
from fhir_assets.privacy.places import SECRET_PLACE
from fhir_assets.warehouse.postgres.db.connections import Connection


def unlock(conn: Connection, cipher: Cipher) -> Cipher:
    """Return ``cipher`` with the secret of this database. Creates the secret when keys are first used. Commits.

    Raises ConfigurationError if the database is encrypted and its key is not among the keys of ``cipher``.
    """
    with conn.transaction():
        encrypted = _read_encrypted_secret(conn)
        if encrypted is None:
            if not cipher.encrypts:
                return cipher
            conn.execute(
                "INSERT INTO ops.encryption (key_id, secret) VALUES (%s, %s) ON CONFLICT DO NOTHING",
                [cipher.key_id, cipher.encrypt(new_secret(), SECRET_PLACE)],
            )
            encrypted = _read_encrypted_secret(conn)
            assert encrypted is not None
    key_id, content = encrypted[0].removesuffix(BOUND), encrypted[1]
    if not cipher.encrypts:
        raise ConfigurationError(
            f"This database is encrypted with key {key_id}, but PHI_ENCRYPTION_KEYS is not set: set it. "
            "Without that key the patient data cannot be read; it must be loaded again into a new database"
        )
    try:
        return cipher.with_secret(cipher.decrypt(content, SECRET_PLACE))
    except EncryptionError as error:
        if key_id in {key.id for key in cipher.keys}:
            raise ConfigurationError(f"The secret of the keyed hashes cannot be read: {error}") from None
        raise ConfigurationError(
            f"This database is encrypted with key {key_id}, which is not in PHI_ENCRYPTION_KEYS (its keys: "
            f"{', '.join(key.id for key in cipher.keys)}): add it as the last key. New keys come before it; "
            "after `fhir-assets keys rotate` it can be removed"
        ) from None


def reencrypt(conn: Connection, cipher: Cipher) -> bool:
    """Encrypt the secret with the newest key. Return True if it was encrypted with another key before."""
    with conn.transaction():
        encrypted = _read_encrypted_secret(conn, lock=True)
        if encrypted is None or encrypted[0] == cipher.key_id:
            return False
        conn.execute(
            "UPDATE ops.encryption SET key_id = %s, secret = %s, encrypted_at = now()",
            [cipher.key_id, cipher.encrypt(cipher.decrypt(encrypted[1], SECRET_PLACE), SECRET_PLACE)],
        )
        return True


def get_key_id(conn: Connection) -> str | None:
    """Return the id of the key that encrypts the secret, None before keys are first used."""
    encrypted = _read_encrypted_secret(conn)
    return encrypted[0] if encrypted else None


def _read_encrypted_secret(conn: Connection, *, lock: bool = False) -> tuple[str, bytes] | None:
    row = conn.execute(
        "SELECT key_id, secret FROM ops.encryption FOR UPDATE" if lock else "SELECT key_id, secret FROM ops.encryption"
    ).fetchone()
    return None if row is None else (row[0], bytes(row[1]))
