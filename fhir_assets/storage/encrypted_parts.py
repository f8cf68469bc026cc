"""The file format of encrypted parts: MARK and a sequence of frames.

A frame is the number of its encrypted bytes, as 4 bytes in big-endian order, followed by these bytes. Each is bound to
its file and to its number in the file.
"""

import io
from collections.abc import Iterator
from typing import BinaryIO, cast

from fhir_assets.privacy.encryption import Cipher, key_id_of
from fhir_assets.privacy.places import Place, frame_place

MARK = b"FSP1"
SUFFIX = ".sealed"
"""The suffix of encrypted files. It cannot be renamed, because existing stores contain it."""
FRAME_BYTES = 1 << 18
_LENGTH = 4


class FrameEncryptor:
    """Encrypts the content of one file, piece by piece, as frames, which follow MARK in the file."""

    def __init__(self, cipher: Cipher, place: Place) -> None:
        self._cipher = cipher
        self._place = place
        self._frames = 0

    def encrypt(self, content: bytes) -> Iterator[bytes]:
        """Yield the frames of the next piece of the content."""
        view = memoryview(content)
        for start in range(0, len(view), FRAME_BYTES):
            place = frame_place(self._place, self._frames)
            encrypted = self._cipher.encrypt(bytes(view[start : start + FRAME_BYTES]), place)
            self._frames += 1
            yield len(encrypted).to_bytes(_LENGTH, "big") + encrypted


def decrypt_stream(file: BinaryIO, cipher: Cipher, place: Place, *, clear: bool = True) -> BinaryIO:
    """Return the content of the file at ``place`` as a stream, decrypted if it is encrypted.

    Clear text is expected if ``clear`` is true. Otherwise EncryptionError is raised if the cipher refuses it.
    """
    head = file.read(len(MARK))
    if head == MARK:
        return cast(BinaryIO, io.BufferedReader(_DecryptedFile(file, cipher, place), FRAME_BYTES))
    if not clear:
        cipher.check_unbound(place)
    if not file.seekable():
        return cast(BinaryIO, io.BufferedReader(_PrefixedFile(head, file), FRAME_BYTES))
    file.seek(0)
    return file


def read_key_id(file: BinaryIO) -> str | None:
    """Return the id of the key that a part is encrypted with, or None for clear text. Only the first bytes are read."""
    if file.read(len(MARK)) != MARK:
        return None
    file.read(_LENGTH)
    return key_id_of(file.read(16))


class _DecryptedFile(io.RawIOBase):
    """Decrypts frame by frame. Raises EOFError if the file is truncated, EncryptionError if it was altered or moved."""

    def __init__(self, file: BinaryIO, cipher: Cipher, place: Place) -> None:
        self._file = file
        self._cipher = cipher
        self._place = place
        self._frames = 0
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        super().close()
        self._file.close()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._rest:
            self._rest = memoryview(self._next())
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)

    def _next(self) -> bytes:
        head = self._file.read(_LENGTH)
        if not head:
            return b""
        length = int.from_bytes(head, "big")
        if len(head) < _LENGTH or length > 2 * FRAME_BYTES:
            raise EOFError
        encrypted = self._file.read(length)
        if len(encrypted) < length:
            raise EOFError
        place = frame_place(self._place, self._frames)
        self._frames += 1
        return self._cipher.decrypt(encrypted, place)


class _PrefixedFile(io.RawIOBase):
    """The complete content of a stream whose first bytes, ``head``, were already read."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        self._head = head
        self._file = file

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        super().close()
        self._file.close()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._head or self._file.read(len(buffer))
        self._head = content[len(buffer) :]
        taken = content[: len(buffer)]
        buffer[: len(taken)] = taken
        return len(taken)
