"""Whole resources, compressed and encrypted; values of columns as Fernet tokens; hashes of what must be found again.

One small object, ``Cipher``, does all three for those who hold the keys. Without keys it is ``CLEAR``, which gives
everything back as it came, so that callers need not ask.

A sealed resource is ``FS1`` + the id of its key (4 bytes) + a nonce (12) + AES-256-GCM of the zlib-compressed bytes,
under a key derived from the Fernet key. The id says at sight which key is needed, and what is still to be rotated.
"""

import base64
import hashlib
import hmac
import os
from collections.abc import Sequence
from functools import cached_property, partial
from typing import cast

from cryptography.exceptions import InvalidTag
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from isal import isal_zlib

from fhir_assets.errors import EncryptionError
from fhir_assets.privacy.keys import ID_BYTES, KEY_BYTES, Key, derive

_DAMAGED_DEFLATE = cast(type[Exception], isal_zlib.error)

MAGIC = b"FS1"
_NONCE_BYTES = 12
_HEAD_BYTES = len(MAGIC) + ID_BYTES + _NONCE_BYTES
_TOKEN = "gAAAAA"
"""How every Fernet token begins: its version, and the first bytes of a time before the year 2106."""

_UNKEYED_BYTES = 16


class Cipher:
    """Seals with the newest of some keys, opens with any of them; hashes with the deployment's secret.

    ``secret`` is the root of the hash keys. It is the same for all keys of a deployment, kept sealed in its database
    (warehouse/vault.py), so that blind indexes, fingerprints and the audit log outlive every rotation.
    """

    def __init__(self, keys: Sequence[Key] = (), secret: bytes | None = None, *, writes: bool = True) -> None:
        self.keys = tuple(keys)
        self.on = bool(keys) and writes
        """Whether what is written is sealed."""
        self._secret = secret
        self._ciphers = {bytes.fromhex(key.id): AESGCM(key.derived("resource")) for key in self.keys}
        self._fernet = MultiFernet([Fernet(key.encoded) for key in self.keys]) if self.keys else None
        if self.keys:
            newest = bytes.fromhex(self.keys[0].id)
            self._head = MAGIC + newest
            self._newest = self._ciphers[newest]

    def __repr__(self) -> str:
        return f"Cipher({', '.join(key.id for key in self.keys)})" if self.keys else "Cipher(no keys)"

    def __reduce__(self) -> tuple[object, ...]:
        return partial(Cipher, writes=self.on), (self.keys, self._secret)

    @property
    def key_id(self) -> str | None:
        """The id of the key that seals now; None without keys."""
        return self.keys[0].id if self.keys else None

    def with_secret(self, secret: bytes) -> "Cipher":
        """The same keys, with the root of the hash keys."""
        return Cipher(self.keys, secret)

    def reading_only(self) -> "Cipher":
        """Opens what is sealed, and writes in the clear."""
        return Cipher(self.keys, self._secret, writes=False)

    # Whole resources, and other bytes

    def compress_and_encrypt(self, content: bytes) -> bytes:
        """The bytes compressed and encrypted; without keys as they are."""
        return self.encrypt(isal_zlib.compress(content, 1)) if self.on else content

    def decrypt_and_decompress(self, sealed: bytes) -> bytes:
        """The bytes that were sealed; what is not sealed is given back as it is. Raises SealingError."""
        if not sealed.startswith(MAGIC):
            return sealed
        try:
            return isal_zlib.decompress(self.decrypt(sealed))
        except _DAMAGED_DEFLATE:
            raise EncryptionError(_DAMAGED) from None

    def encrypt(self, content: bytes) -> bytes:
        """As ``seal``, without compression."""
        if not self.on:
            return content
        nonce = os.urandom(_NONCE_BYTES)
        return self._head + nonce + self._newest.encrypt(nonce, content, None)

    def decrypt(self, sealed: bytes) -> bytes:
        """What ``encrypt`` was given. Raises SealingError if the key is not there, or the bytes were altered."""
        if not sealed.startswith(MAGIC) or len(sealed) <= _HEAD_BYTES:
            raise EncryptionError(_DAMAGED)
        cipher = self._ciphers.get(sealed[len(MAGIC) : len(MAGIC) + ID_BYTES])
        if cipher is None:
            raise EncryptionError(self._missing(sealed_by(sealed)))
        nonce = sealed[_HEAD_BYTES - _NONCE_BYTES : _HEAD_BYTES]
        try:
            return cipher.decrypt(nonce, sealed[_HEAD_BYTES:], None)
        except InvalidTag:
            raise EncryptionError(_DAMAGED) from None

    def reencrypt(self, content: bytes) -> bytes:
        """What another key sealed, or none, sealed by the newest. Raises SealingError."""
        return self.encrypt(self.decrypt(content)) if content.startswith(MAGIC) else self.compress_and_encrypt(content)

    # Values of columns

    def token(self, value: str) -> str:
        """A value as a Fernet token; without keys the value."""
        return self._fernet.encrypt(value.encode()).decode() if self._fernet else value

    def read_token(self, token: str) -> str:
        """The value of a token; what is no token is given back as it is. Raises SealingError."""
        if not is_token(token):
            return token
        if self._fernet is None:
            raise EncryptionError(self._missing(None))
        try:
            return self._fernet.decrypt(token).decode()
        except InvalidToken:
            raise EncryptionError(
                "a token was made with a key that is not among PHI_ENCRYPTION_KEYS, or was altered: "
                "add the key that is missing as the last one"
            ) from None

    def retoken(self, value: str) -> str:
        """A token made by another key as one of the newest; what is no token stays as it is. Raises SealingError."""
        return self.token(self.read_token(value)) if is_token(value) else value

    # Hashes

    def index(self, value: str) -> str:
        """The blind index of a value: HMAC-SHA256 in hexadecimal, equal for equal values in every column."""
        return hmac.digest(self._index_key, value.encode(), "sha256").hex()

    def fingerprint(self, content: bytes) -> bytes:
        """16 bytes that tell contents apart: keyed where there are keys, since they are made of patient data."""
        if not self.keys:
            return hashlib.blake2b(content, digest_size=_UNKEYED_BYTES).digest()
        return hashlib.blake2b(content, digest_size=_UNKEYED_BYTES, key=self._fingerprint_key).digest()

    def subject(self, resource_type: str, resource_id: str) -> str:
        """The hash that names a resource where its id must not stand: HMAC-SHA256, 32 hexadecimal digits."""
        return hmac.digest(self._subject_key, f"{resource_type}/{resource_id}".encode(), "sha256").hex()[:32]

    def identity(self, resource_type: str, number: str) -> str:
        """The id of a resource that is known by a number (an MRN): the same always, and with keys nobody can find the
        number by trying all. 32 hexadecimal digits.
        """
        return hmac.digest(self._identity_key, f"{resource_type}/{number}".encode(), "sha256").hex()[:32]

    def chained(self, content: bytes) -> bytes:
        """The link of a chain of records: HMAC-SHA256, which only those who hold the keys can forge."""
        return hmac.digest(self._chain_key, content, "sha256")

    @cached_property
    def _index_key(self) -> bytes:
        return self._hash_key("blind index")

    @cached_property
    def _fingerprint_key(self) -> bytes:
        return self._hash_key("fingerprint")

    @cached_property
    def _subject_key(self) -> bytes:
        return self._hash_key("subject")

    @cached_property
    def _identity_key(self) -> bytes:
        return self._hash_key("identity")

    @cached_property
    def _chain_key(self) -> bytes:
        return self._hash_key("chain")

    def _hash_key(self, purpose: str) -> bytes:
        if self._secret is None:
            if self.keys:
                raise EncryptionError("the secret of the hashes is not loaded: connect through Warehouse.connect")
            return _UNKEYED
        return derive(self._secret, purpose)

    def _missing(self, key_id: str | None) -> str:
        named = f"key {key_id}" if key_id else "a key"
        have = f"there are only {', '.join(key.id for key in self.keys)}" if self.keys else "there is none"
        return (
            f"patient data is sealed with {named}, which PHI_ENCRYPTION_KEYS lacks ({have}): add it as the last one, "
            "then `fhir-assets keys rotate`"
        )


def new_secret() -> bytes:
    """A fresh root of the hash keys."""
    return os.urandom(KEY_BYTES)


def sealed_by(sealed: bytes) -> str | None:
    """The id of the key that sealed these bytes; None if they are in the clear."""
    return sealed[len(MAGIC) : len(MAGIC) + ID_BYTES].hex() if sealed.startswith(MAGIC) else None


def is_token(value: str) -> bool:
    """Whether a value looks like a Fernet token."""
    return value.startswith(_TOKEN)


def as_json(sealed: bytes) -> bytes:
    """Sealed bytes as a JSON string, for a column of type jsonb."""
    return b'"' + base64.b64encode(sealed) + b'"'


def from_json(value: str) -> bytes:
    """The sealed bytes of such a string. Raises SealingError."""
    try:
        return base64.b64decode(value, validate=True)
    except ValueError:
        raise EncryptionError(_DAMAGED) from None


_DAMAGED = "sealed patient data is damaged, or was altered: load its window again"
_UNKEYED = b"fhir_assets: no keys"

NO_ENCRYPTION = Cipher()
"""Without keys: everything stays as it is."""
