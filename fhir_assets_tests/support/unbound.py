"""Encryption as earlier releases wrote it: not bound to a place."""

import os
from collections.abc import Callable

from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fhir_assets.privacy.encryption import Cipher
from fhir_assets.warehouse.ops import encryption_secret
from fhir_assets.warehouse.postgres.db.connections import Session, connect


class UnboundCipher(Cipher):
    """Writes ``FS1`` and Fernet tokens, and reads what other ciphers read."""

    @property
    def key_id(self) -> str | None:
        return self.keys[0].id

    def _encrypt(self, content: bytes, associated_data: bytes) -> bytes:
        key, nonce = self.keys[0], os.urandom(12)
        return b"FS1" + bytes.fromhex(key.id) + nonce + AESGCM(key.derived("resource")).encrypt(nonce, content, None)

    def build_encryptor(self, table: str, column: str, source: str) -> Callable[[str, str], str]:
        fernet = Fernet(self.keys[0].encoded)
        return lambda value, key: fernet.encrypt(value.encode()).decode()


def make_unbound(cipher: Cipher) -> UnboundCipher:
    """Return a cipher with the same keys that writes as earlier releases did."""
    return UnboundCipher(cipher.keys, cipher._secret)


def open_unbound_session(url: str, cipher: Cipher) -> Session:
    """Open a session that writes as earlier releases did."""
    with connect(url) as conn:
        return connect(url, cipher=make_unbound(encryption_secret.unlock(conn, cipher)))
