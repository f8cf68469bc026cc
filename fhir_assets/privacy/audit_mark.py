"""The mark of the audit log: the number and the link of a record, kept outside of the database.

A database that lost the end of its log, or whose log was cut, contradicts the mark. With encryption keys the mark is
signed, so that only a holder of the keys can forge it.
"""

from datetime import UTC, datetime
from hmac import compare_digest

import msgspec

from fhir_assets.privacy.encryption import Cipher


class AcceptedLoss(msgspec.Struct, frozen=True):
    """A mark that the log contradicted when a person accepted it, for example after a backup was restored."""

    seq: int
    link: str
    at: datetime
    accepted_at: datetime


class Mark(msgspec.Struct, frozen=True):
    """States that record ``seq`` of the log had the hexadecimal ``link`` at a time.

    ``signature`` is the HMAC of all other fields; without keys it only detects damage.
    """

    seq: int
    link: str
    at: datetime
    losses: tuple[AcceptedLoss, ...] = ()
    keyed: bool = False
    signature: str = ""

    def is_valid(self, cipher: Cipher) -> bool:
        """Return whether the signature is that of this deployment. With keys, a mark without keys is not valid."""
        return self.keyed == cipher.encrypts and compare_digest(self.signature, _sign(self, cipher))


def build_mark(seq: int, link: str, cipher: Cipher, losses: tuple[AcceptedLoss, ...] = ()) -> Mark:
    """Return the signed mark of a record, with the present time."""
    mark = Mark(seq, link, datetime.now(UTC), losses, cipher.encrypts)
    return msgspec.structs.replace(mark, signature=_sign(mark, cipher))


def encode_mark(mark: Mark) -> bytes:
    """Return the content of the file ``audit.MARK``."""
    return msgspec.json.format(msgspec.json.encode(mark), indent=1)


def decode_mark(content: bytes) -> Mark:
    """Return the mark in the content of the file; one without a signature if the content is damaged."""
    try:
        return msgspec.json.decode(content, type=Mark)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Mark(0, "", datetime.now(UTC))


def _sign(mark: Mark, cipher: Cipher) -> str:
    content = msgspec.json.encode(msgspec.structs.replace(mark, signature=""))
    return cipher.sign_audit_mark(content).hex()
