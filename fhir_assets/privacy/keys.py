"""Encryption keys: parsing, validation and ids.

Only the id of a key appears in messages and logs, never the key.
"""

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from cryptography.fernet import Fernet
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fhir_assets.errors import ConfigurationError

KEY_BYTES = 32
ID_BYTES = 4
_MIN_DISTINCT_BYTES = 16
"""The minimum number of distinct bytes in a key. About one of 10^18 random keys has fewer."""

_ADVICE = "create one by `fhir-assets keys new`"


@dataclass(frozen=True)
class Key:
    """One Fernet key. Other keys are derived from it, each for a single purpose."""

    secret: bytes = field(repr=False)

    @cached_property
    def id(self) -> str:
        """The public id of the key, stored with the data that it encrypts: 8 hexadecimal digits, derived by HKDF."""
        return self.derived("id", ID_BYTES).hex()

    @property
    def encoded(self) -> bytes:
        """The key in the encoding that Fernet takes."""
        return base64.urlsafe_b64encode(self.secret)

    def derived(self, purpose: str, length: int = KEY_BYTES) -> bytes:
        """Return a key for one purpose, derived with HKDF-SHA256 (RFC 5869)."""
        return derive(self.secret, purpose, length)


def derive(secret: bytes, purpose: str, length: int = KEY_BYTES) -> bytes:
    """Derive a key for one purpose from ``secret`` with HKDF-SHA256 (RFC 5869)."""
    return HKDF(hashes.SHA256(), length, salt=None, info=b"fhir_assets:" + purpose.encode()).derive(secret)


def new_key() -> str:
    """Return a new random key in the form of PHI_ENCRYPTION_KEYS."""
    return Fernet.generate_key().decode()


def parse_keys(texts: Iterable[str]) -> tuple[Key, ...]:
    """Parse keys in the form of PHI_ENCRYPTION_KEYS, the newest first.

    Raises ConfigurationError for a key that is malformed, weak or given twice. The message names the key by its
    position.
    """
    keys = tuple(_parse(position, text) for position, text in enumerate(texts, start=1))
    if len({key.secret for key in keys}) < len(keys):
        raise ConfigurationError("PHI_ENCRYPTION_KEYS holds the same key twice: list every key once, the newest first")
    return keys


def _parse(position: int, text: str) -> Key:
    name = f"key {position} of PHI_ENCRYPTION_KEYS"
    try:
        secret = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise ConfigurationError(
            f"{name} is malformed: a Fernet key is 32 bytes in URL-safe base64; {_ADVICE}"
        ) from None
    if len(secret) != KEY_BYTES:
        raise ConfigurationError(f"{name} is malformed: it has {len(secret)} bytes, and a Fernet key has 32; {_ADVICE}")
    if _is_weak(secret):
        raise ConfigurationError(f"{name} is weak: it is text or a pattern, not a random key; {_ADVICE}")
    return Key(secret)


def _is_weak(secret: bytes) -> bool:
    """Return whether a secret is not random: few distinct bytes, equal steps between bytes, or readable text."""
    steps = {(after - before) % 256 for before, after in pairwise(secret)}
    readable = all(0x20 <= byte < 0x7F for byte in secret)
    return len(set(secret)) < _MIN_DISTINCT_BYTES or len(steps) == 1 or readable
