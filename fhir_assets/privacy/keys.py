"""The keys of a deployment: read, judged, named. A key is never printed, logged or put into a message; its id is."""

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
_FEWEST_DISTINCT = 16
"""Different bytes that a key has at least: of 32 random ones fewer come once in 10^18 keys."""

_HOW = "make one with `fhir-assets keys new`"


@dataclass(frozen=True)
class Key:
    """One Fernet key. Other keys are derived from it, each for a single purpose."""

    secret: bytes = field(repr=False)

    @cached_property
    def id(self) -> str:
        """Names the key where something is sealed with it, and gives nothing of it away: 8 hexadecimal digits."""
        return self.derived("id", ID_BYTES).hex()

    @property
    def encoded(self) -> bytes:
        """The key as Fernet reads it."""
        return base64.urlsafe_b64encode(self.secret)

    def derived(self, purpose: str, length: int = KEY_BYTES) -> bytes:
        """A key of its own for one purpose (HKDF-SHA256, RFC 5869)."""
        return derive(self.secret, purpose, length)


def derive(secret: bytes, purpose: str, length: int = KEY_BYTES) -> bytes:
    """The key that HKDF-SHA256 (RFC 5869) derives from ``secret`` for one purpose."""
    return HKDF(hashes.SHA256(), length, salt=None, info=b"fhir_assets:" + purpose.encode()).derive(secret)


def new_key() -> str:
    """A fresh key, as PHI_ENCRYPTION_KEYS takes it."""
    return Fernet.generate_key().decode()


def parse_keys(texts: Iterable[str]) -> tuple[Key, ...]:
    """The keys of their encoded forms, newest first. Raises ConfigurationError for one that is malformed, weak or
    given twice; the message says which by its place, never by its content.
    """
    keys = tuple(_parse(place, text) for place, text in enumerate(texts, start=1))
    if len({key.secret for key in keys}) < len(keys):
        raise ConfigurationError("PHI_ENCRYPTION_KEYS holds the same key twice: list every key once, the newest first")
    return keys


def _parse(place: int, text: str) -> Key:
    what = f"key {place} of PHI_ENCRYPTION_KEYS"
    try:
        secret = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise ConfigurationError(f"{what} is malformed: a Fernet key is 32 bytes in URL-safe base64; {_HOW}") from None
    if len(secret) != KEY_BYTES:
        raise ConfigurationError(f"{what} is malformed: it has {len(secret)} bytes, a Fernet key has 32; {_HOW}")
    if _is_weak(secret):
        raise ConfigurationError(f"{what} is weak: it is no random key but a text or a pattern; {_HOW}")
    return Key(secret)


def _is_weak(secret: bytes) -> bool:
    """Whether no random generator made this: few different bytes, steps of one size, or readable text."""
    steps = {(after - before) % 256 for before, after in pairwise(secret)}
    readable = all(0x20 <= byte < 0x7F for byte in secret)
    return len(set(secret)) < _FEWEST_DISTINCT or len(steps) == 1 or readable
