"""Encryption of patient data: whole resources, values of columns, and keyed hashes.

``Cipher`` does all three with the keys of a deployment. Without keys the cipher is ``NO_ENCRYPTION``, which returns
everything unchanged, so that callers need no special case.

An encrypted resource consists of ``FS2``, the id of the key (4 bytes), a nonce (12 bytes) and the AES-256-GCM
ciphertext of the zlib-compressed bytes. The AES key is derived from the Fernet key. A value of a column is ``fs2_`` and
the same, uncompressed, in URL-safe base64. Each column has an AES key of its own, because a key must not encrypt more
than 2^32 values with random nonces (NIST SP 800-38D, section 8.3). The associated data of both is the ``Place`` of the
value, so that a value that was moved to another row is refused.

Earlier releases wrote ``FS1`` without associated data, and Fernet tokens. Both stay readable until a key rotation has
bound them to their places.
"""

import base64
import hashlib
import hmac
import os
import re
from binascii import b2a_base64
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import cast

from cryptography.exceptions import InvalidTag
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from isal import isal_zlib

from fhir_assets.errors import EncryptionError
from fhir_assets.privacy.keys import ID_BYTES, KEY_BYTES, Key, derive
from fhir_assets.privacy.places import FILE, Place

_DAMAGED_DEFLATE = cast(type[Exception], isal_zlib.error)

MAGIC = b"FS2"
_UNBOUND_MAGIC = b"FS1"
_MAGICS = (MAGIC, _UNBOUND_MAGIC)
_NONCE_BYTES = 12
_HEAD_BYTES = len(MAGIC) + ID_BYTES + _NONCE_BYTES
_TOKEN = "fs2_"
_IS_TOKEN = re.compile(r"fs2_[-_A-Za-z0-9]{43,}").fullmatch
_FERNET_TOKEN = "gAAAAA"
"""The first characters of every Fernet token until the year 2106: its version and the first bytes of its time."""
BOUND = ":bound"
"""The end of the key id that is stored beside a value that is bound to its place."""

_UNKEYED_BYTES = 16


class Cipher:
    """Encrypts with the newest of its keys, decrypts with any of them, and hashes with the secret of the deployment.

    ``secret`` is the root of the hash keys. A deployment has one secret, which is stored, encrypted, in the database
    (``warehouse/ops/encryption_secret.py``), so that blind indexes, fingerprints and the audit log survive
    every key rotation. With ``writes=False`` the cipher decrypts, but does not encrypt. With ``bound_only`` it refuses
    what is not bound to a place: clear text and what earlier releases encrypted.
    """

    def __init__(
        self, keys: Sequence[Key] = (), secret: bytes | None = None, *, writes: bool = True, bound_only: bool = False
    ) -> None:
        self.keys = tuple(keys)
        self.bound_only = bound_only
        self.encrypts = bool(keys) and writes
        """Whether written data is encrypted."""
        self._secret = secret
        self._ciphers = {bytes.fromhex(key.id): AESGCM(key.derived("resource")) for key in self.keys}
        self._column_ciphers: dict[tuple[bytes, str, str], AESGCM] = {}
        self._fernet = MultiFernet([Fernet(key.encoded) for key in self.keys]) if self.keys else None
        if self.keys:
            newest = bytes.fromhex(self.keys[0].id)
            self._head = MAGIC + newest
            self._newest = self._ciphers[newest]

    def __repr__(self) -> str:
        return f"Cipher({', '.join(key.id for key in self.keys)})" if self.keys else "Cipher(no keys)"

    def __reduce__(self) -> tuple[object, ...]:
        return partial(Cipher, writes=self.encrypts, bound_only=self.bound_only), (self.keys, self._secret)

    @property
    def key_id(self) -> str | None:
        """The key id that is stored beside what this cipher encrypts, or None without keys."""
        return self.keys[0].id + BOUND if self.keys else None

    @property
    def outdated_key_ids(self) -> list[str]:
        """The stored key ids of readable values that are to be encrypted again: of older keys, or not bound."""
        return [*(key.id for key in self.keys), *(key.id + BOUND for key in self.keys[1:])]

    def with_secret(self, secret: bytes) -> "Cipher":
        """Return a cipher with the same keys and ``secret`` as the root of the hash keys."""
        return Cipher(self.keys, secret, bound_only=self.bound_only)

    def reading_only(self) -> "Cipher":
        """Return a cipher that decrypts with the same keys and writes clear text."""
        return Cipher(self.keys, self._secret, writes=False, bound_only=self.bound_only)

    # Bytes, for example whole resources

    def compress_and_encrypt(self, content: bytes, place: Place) -> bytes:
        """Return ``content`` compressed with zlib, encrypted and bound to ``place``, or unchanged without keys."""
        return self.compress_and_bind(content, place.associated_data) if self.encrypts else content

    def compress_and_bind(self, content: bytes, associated_data: bytes) -> bytes:
        """Do the same as ``compress_and_encrypt`` with the associated data of a place. Keys are required."""
        return self._encrypt(isal_zlib.compress(content, 1), associated_data)

    def decrypt_and_decompress(self, encrypted: bytes, place: Place) -> bytes:
        """Reverse ``compress_and_encrypt``. Clear text is returned unchanged, unless it is refused.

        Raises EncryptionError if the key is missing, or if the bytes were altered or belong to another place.
        """
        if not encrypted.startswith(_MAGICS):
            if encrypted:
                self.check_unbound(place)
            return encrypted
        try:
            return isal_zlib.decompress(self.decrypt(encrypted, place))
        except _DAMAGED_DEFLATE:
            raise EncryptionError(_describe_damage(place)) from None

    def encrypt(self, content: bytes, place: Place) -> bytes:
        """Return ``content`` encrypted without compression and bound to ``place``, or unchanged without keys."""
        return self._encrypt(content, place.associated_data) if self.encrypts else content

    def _encrypt(self, content: bytes, associated_data: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return self._head + nonce + self._newest.encrypt(nonce, content, associated_data)

    def decrypt(self, encrypted: bytes, place: Place) -> bytes:
        """Reverse ``encrypt``.

        Raises EncryptionError if the key is missing, if the bytes were altered or belong to another place, or if they
        are not encrypted at all.
        """
        if not encrypted.startswith(_MAGICS) or len(encrypted) <= _HEAD_BYTES:
            raise EncryptionError(_describe_damage(place))
        key_id = encrypted[len(MAGIC) : len(MAGIC) + ID_BYTES]
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise EncryptionError(self._describe_missing_key(key_id.hex()))
        nonce = encrypted[_HEAD_BYTES - _NONCE_BYTES : _HEAD_BYTES]
        if not encrypted.startswith(MAGIC):
            self.check_unbound(place)
        associated_data = place.associated_data if encrypted.startswith(MAGIC) else None
        try:
            return cipher.decrypt(nonce, encrypted[_HEAD_BYTES:], associated_data)
        except InvalidTag:
            raise EncryptionError(_describe_damage(place)) from None

    def reencrypt(self, content: bytes, place: Place) -> bytes:
        """Return encrypted or clear-text ``content`` encrypted with the newest key. Raises EncryptionError."""
        if content.startswith(_MAGICS):
            return self.encrypt(self.decrypt(content, place), place)
        return self.compress_and_encrypt(content, place)

    def check_unbound(self, place: Place) -> None:
        """Raise EncryptionError if this cipher refuses what is not bound to ``place``."""
        if self.bound_only:
            raise EncryptionError(
                f"patient data in {place.table}{_name_column(place)} is not bound to its place, and PHI_BOUND_ONLY "
                "refuses it: if an earlier release may have written it, run `fhir-assets keys rotate` without "
                "PHI_BOUND_ONLY. Otherwise it was exchanged: restore it from a backup, or load its window again"
            )

    # Values of columns

    def build_encryptor(self, table: str, column: str, source: str) -> Callable[[str, str], str]:
        """Return a function that encrypts values of a column: it takes a value and the key of its row.

        Without keys it returns the value unchanged.
        """
        if not self.keys:
            return lambda value, key: value
        key_id = bytes.fromhex(self.keys[0].id)
        encrypt = self._get_column_cipher(key_id, table, column).encrypt
        start = Place(table, column, source, "").associated_data

        def encrypt_value(value: str, key: str) -> str:
            nonce = os.urandom(_NONCE_BYTES)
            ciphertext = encrypt(nonce, value.encode(), start + key.encode())
            encoded = b2a_base64(key_id + nonce + ciphertext, newline=False)
            return _TOKEN + encoded.translate(_URL_SAFE, b"=").decode()

        return encrypt_value

    def encrypt_token(self, value: str, place: Place) -> str:
        """Return ``value`` as a token that is bound to ``place``, or unchanged without keys."""
        return self.build_encryptor(*place[:3])(value, place.key)

    def decrypt_token(self, token: str, place: Place) -> str:
        """Return the value of a token; any other text is returned unchanged.

        Raises EncryptionError if the key is missing, or if the token was altered or belongs to another place.
        """
        if _IS_TOKEN(token):
            return self._decrypt_bound_token(token, place)
        self.check_unbound(place)
        if not token.startswith(_FERNET_TOKEN):
            return token
        if self._fernet is None:
            raise EncryptionError(self._describe_missing_key(None))
        try:
            return self._fernet.decrypt(token).decode()
        except InvalidToken:
            raise EncryptionError(
                "a value is encrypted with a key that is not among PHI_ENCRYPTION_KEYS, or was altered: "
                "add the missing key as the last one"
            ) from None

    def _decrypt_bound_token(self, token: str, place: Place) -> str:
        text = token[len(_TOKEN) :]
        try:
            content = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        except ValueError:
            raise EncryptionError(_describe_damage(place)) from None
        key_id, nonce = content[:ID_BYTES], content[ID_BYTES : ID_BYTES + _NONCE_BYTES]
        if key_id not in self._ciphers:
            raise EncryptionError(self._describe_missing_key(key_id.hex()))
        cipher = self._get_column_cipher(key_id, place.table, place.column)
        try:
            return cipher.decrypt(nonce, content[ID_BYTES + _NONCE_BYTES :], place.associated_data).decode()
        except InvalidTag:
            raise EncryptionError(_describe_damage(place)) from None

    def _get_column_cipher(self, key_id: bytes, table: str, column: str) -> AESGCM:
        cipher = self._column_ciphers.get((key_id, table, column))
        if cipher is None:
            key = next(key for key in self.keys if bytes.fromhex(key.id) == key_id)
            cipher = self._column_ciphers[key_id, table, column] = AESGCM(key.derived(f"value\0{table}\0{column}"))
        return cipher

    def reencrypt_token(self, value: str, place: Place) -> str:
        """Return a token encrypted with the newest key; any other text is returned unchanged.

        Raises EncryptionError.
        """
        return self.encrypt_token(self.decrypt_token(value, place), place) if is_token(value) else value

    # Hashes

    def index(self, value: str) -> str:
        """Return the blind index of a value: its HMAC-SHA256 in hexadecimal. It is the same in every column."""
        return hmac.digest(self._index_key, value.encode(), "sha256").hex()

    def fingerprint(self, content: bytes) -> bytes:
        """Return a hash of ``content``: 16 bytes, keyed if there are keys, because the content is patient data."""
        if not self.keys:
            return hashlib.blake2b(content, digest_size=_UNKEYED_BYTES).digest()
        return hashlib.blake2b(content, digest_size=_UNKEYED_BYTES, key=self._fingerprint_key).digest()

    def subject(self, resource_type: str, resource_id: str) -> str:
        """Return the hash that names a resource in place of its id: HMAC-SHA256, 32 hexadecimal digits."""
        return hmac.digest(self._subject_key, f"{resource_type}/{resource_id}".encode(), "sha256").hex()[:32]

    def identity(self, resource_type: str, number: str) -> str:
        """Return the resource id that is derived from a business number, for example an MRN: 32 hexadecimal digits.

        The same number always gives the same id. In a deployment with keys, the number cannot be found by hashing all
        possible numbers.
        """
        return hmac.digest(self._identity_key, f"{resource_type}/{number}".encode(), "sha256").hex()[:32]

    def hash_file_name(self, source: str, folder: str, name: str) -> str:
        """Return the hash that stands for the name of a file of a source: HMAC-SHA256, 32 hexadecimal digits."""
        content = f"{source}\0{folder}\0{name}".encode("utf-8", "surrogatepass")
        return hmac.digest(self._file_name_key, content, "sha256").hex()[:32]

    def chain_link(self, content: bytes) -> bytes:
        """Return the link of a record in a hash chain: an HMAC-SHA256, which only a holder of the keys can forge."""
        return hmac.digest(self._chain_key, content, "sha256")

    def sign_audit_mark(self, content: bytes) -> bytes:
        """Return the HMAC-SHA256 that signs the mark of the audit log, which only a holder of the keys can forge."""
        return hmac.digest(self._mark_key, content, "sha256")

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
    def _file_name_key(self) -> bytes:
        return self._hash_key("file name")

    @cached_property
    def _chain_key(self) -> bytes:
        return self._hash_key("chain")

    @cached_property
    def _mark_key(self) -> bytes:
        return self._hash_key("audit mark")

    def _hash_key(self, purpose: str) -> bytes:
        if self._secret is None:
            if self.keys:
                raise EncryptionError("the secret of the keyed hashes is not loaded: connect through Warehouse.connect")
            return _UNKEYED
        return derive(self._secret, purpose)

    def _describe_missing_key(self, key_id: str | None) -> str:
        named = f"key {key_id}" if key_id else "a key"
        present = f"it holds {', '.join(key.id for key in self.keys)}" if self.keys else "it holds no key"
        return (
            f"patient data is encrypted with {named}, which PHI_ENCRYPTION_KEYS lacks ({present}): add it as the last "
            "key, then run `fhir-assets keys rotate`"
        )


def new_secret() -> bytes:
    """Return a new random root of the hash keys."""
    return os.urandom(KEY_BYTES)


def key_id_of(content: bytes) -> str | None:
    """Return the key id to store beside ``content``, or None for clear text."""
    if not content.startswith(_MAGICS):
        return None
    return content[len(MAGIC) : len(MAGIC) + ID_BYTES].hex() + (BOUND if content.startswith(MAGIC) else "")


def is_bound(content: bytes) -> bool:
    """Return whether encrypted ``content`` is bound to its place."""
    return content.startswith(MAGIC)


def is_token(value: str) -> bool:
    """Return whether a value looks like a token, of this or an earlier release."""
    return value.startswith(_FERNET_TOKEN) or _IS_TOKEN(value) is not None


def as_json(encrypted: bytes) -> bytes:
    """Return encrypted bytes as a base64 JSON string, for a column of type jsonb."""
    return b'"' + base64.b64encode(encrypted) + b'"'


def from_json(value: str) -> bytes:
    """Return the encrypted bytes of a string that ``as_json`` made. Raises EncryptionError if it is damaged."""
    try:
        return base64.b64decode(value, validate=True)
    except ValueError:
        raise EncryptionError("encrypted patient data is damaged: load its window again") from None


def _describe_damage(place: Place) -> str:
    other = "file" if place.column == FILE else "row"
    return (
        f"encrypted patient data is damaged, was altered, or belongs to another {other} "
        f"(in {place.table}{_name_column(place)}): load its window again, or restore it from a backup"
    )


def _name_column(place: Place) -> str:
    return "" if place.column == FILE else f", column {place.column}"


_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_UNKEYED = b"fhir_assets: no keys"

NO_ENCRYPTION = Cipher()
"""The cipher without keys: it returns everything unchanged."""
