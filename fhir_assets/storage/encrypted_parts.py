"""Parts that are encrypted: a mark, then frames, each the length of its sealed bytes and these bytes."""

import io
from collections.abc import Iterator
from typing import BinaryIO, cast

from fhir_assets.privacy.encryption import Cipher, sealed_by

MARK = b"FSP1"
SUFFIX = ".sealed"
FRAME_BYTES = 1 << 18
_LENGTH = 4


def frames(content: bytes, cipher: Cipher) -> Iterator[bytes]:
    """The content of a part as the frames that go into its file, after MARK."""
    view = memoryview(content)
    for start in range(0, len(view), FRAME_BYTES):
        sealed = cipher.encrypt(bytes(view[start : start + FRAME_BYTES]))
        yield len(sealed).to_bytes(_LENGTH, "big") + sealed


def opened(file: BinaryIO, cipher: Cipher) -> BinaryIO:
    """The content of a part as a stream: decrypted if it is sealed, else the file itself."""
    if not file.seekable():
        head = file.read(len(MARK))
        raw = _Opened(file, cipher) if head == MARK else _Joined(head, file)
        return cast(BinaryIO, io.BufferedReader(raw, FRAME_BYTES))
    if file.read(len(MARK)) == MARK:
        return cast(BinaryIO, io.BufferedReader(_Opened(file, cipher), FRAME_BYTES))
    file.seek(0)
    return file


def key_of(file: BinaryIO) -> str | None:
    """The id of the key that seals a part; None if it is in the clear."""
    if file.read(len(MARK)) != MARK:
        return None
    file.read(_LENGTH)
    return sealed_by(file.read(16))


class _Opened(io.RawIOBase):
    """Decrypts frame by frame. Raises EOFError where the file was cut off, SealingError where it was altered."""

    def __init__(self, file: BinaryIO, cipher: Cipher) -> None:
        self._file = file
        self._cipher = cipher
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
        sealed = self._file.read(length)
        if len(sealed) < length:
            raise EOFError
        return self._cipher.decrypt(sealed)


class _Joined(io.RawIOBase):
    """What was read of a stream already, and the rest of it."""

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
