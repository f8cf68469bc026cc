"""Read the lines of a text file, plain or compressed with gzip, in bounded memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from isal import isal_zlib

_PLAIN_BYTES = 1 << 20
_COMPRESSED_BYTES = 1 << 16
_DECOMPRESSED_BYTES = 1 << 18
_GZIP_ERROR = cast(type[Exception], isal_zlib.error)
_GZIP = 16 + isal_zlib.MAX_WBITS
_GZIP_MAGIC = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"


_UNCHECKED_BYTES = 64 << 20
"""Decompressed bytes up to which the ratio of a file does not matter, and compressed ones that need have no content."""


@dataclass(frozen=True, slots=True)
class FileLimits:
    """The limits of one file: its bytes before and after decompression, and the ratio of the latter to the former.

    ``rejected`` limits the parts of a type that each become a dead letter. ``bytes_name``, ``ratio_name`` and
    ``rejected_name`` are the names of the limits in messages.
    """

    bytes: int = 64 << 30
    ratio: float = 400
    bytes_name: str = "the limit of a file"
    ratio_name: str = "the limit of a file"
    rejected: int = 10_000
    rejected_name: str = "the limit of a file"


DEFAULT_LIMITS = FileLimits()
UNLIMITED = FileLimits(bytes=2**63, ratio=float("inf"))
"""For content whose reader has limits of its own."""


class DamagedFile(Exception):
    """A file is cut off, damaged, or beyond a limit. The content before that has been returned."""


def read_lines(path: Path, limit: int) -> Iterator[list[bytes | None]]:
    """Read the lines of a file in batches, without line feeds. A line of more than ``limit`` bytes is returned as None.

    gzip is recognized by the first bytes of the file, not by its name. Consecutive gzip members are one file, and a
    byte order mark is removed. Raises DamagedFile, and OSError if the file cannot be read.
    """
    with path.open("rb") as file:
        yield from split_lines(decompress(file), limit)


def decompress(file: BinaryIO, limits: FileLimits = DEFAULT_LIMITS) -> Iterator[bytes]:
    """Yield the content of a stream in pieces, decompressed if its first bytes are those of gzip.

    The stream need not be seekable. Raises DamagedFile, also if the file is beyond the limits.
    """
    counter = _Counter(file, limits)
    total = 0
    for piece in _decompress(cast(BinaryIO, counter)):
        total += len(piece)
        counter.idle = 0
        if total > limits.bytes:
            raise _build_size_error(limits)
        if total > _UNCHECKED_BYTES and total > counter.count * limits.ratio:
            raise DamagedFile(
                f"the file is more than {limits.ratio:g} times as large after decompression ({limits.ratio_name}), "
                "as no file of resources is: give it uncompressed if it is one"
            )
        yield piece


class _Counter:
    """Counts the bytes that are read of a stream: ``idle`` are those since its last content.

    Content may be followed by zeros, or by members without content, and neither need have an end.
    """

    def __init__(self, file: BinaryIO, limits: FileLimits) -> None:
        self._file = file
        self._limits = limits
        self.count = self.idle = 0

    def read(self, count: int) -> bytes:
        piece = self._file.read(count)
        self.count += len(piece)
        self.idle += len(piece)
        if self.count > self._limits.bytes:
            raise _build_size_error(self._limits)
        if self.idle > _UNCHECKED_BYTES:
            raise DamagedFile(f"the compressed file has {_UNCHECKED_BYTES >> 20} MiB without content: give it anew")
        return piece


def _build_size_error(limits: FileLimits) -> DamagedFile:
    return DamagedFile(f"the file is larger than {limits.bytes:,} bytes ({limits.bytes_name})")


def _decompress(file: BinaryIO) -> Iterator[bytes]:
    head = file.read(len(_GZIP_MAGIC))
    if head == _GZIP_MAGIC:
        yield from _decompress_members(head + file.read(_COMPRESSED_BYTES), file)
        return
    if head:
        yield head + file.read(_PLAIN_BYTES)
    while chunk := file.read(_PLAIN_BYTES):
        yield chunk


def _decompress_members(compressed: bytes, file: BinaryIO) -> Iterator[bytes]:
    """Yield the content of gzip members in small pieces, including the available content of a truncated member."""
    while compressed:
        member = isal_zlib.decompressobj(wbits=_GZIP)
        while not member.eof:
            compressed = member.unconsumed_tail or compressed or file.read(_COMPRESSED_BYTES)
            try:
                piece = member.decompress(compressed, _DECOMPRESSED_BYTES)
            except _GZIP_ERROR:
                raise DamagedFile("the compressed file is damaged") from None
            if piece:
                yield piece
            elif not compressed:
                raise DamagedFile("the compressed file ends too early: it was cut off")
            compressed = b""
        compressed = _next_member(member.unused_data, file)


def _next_member(rest: bytes, file: BinaryIO) -> bytes:
    """Return the start of the next member, without the zero bytes that tapes and block devices append."""
    while not (rest := rest.lstrip(b"\0")):
        if not (rest := file.read(_COMPRESSED_BYTES)):
            break
    return rest


def split_lines(chunks: Iterable[bytes], limit: int) -> Iterator[list[bytes | None]]:
    """Split content into lines without line feeds, in batches. A line of more than ``limit`` bytes is None."""
    parts: list[bytes] = []
    length = 0
    first = True
    for chunk in chunks:
        head, *lines = (chunk.removeprefix(_BOM) if first else chunk).split(b"\n")
        first = False
        length += len(head)
        if length <= limit:
            parts.append(head)
        else:
            parts.clear()
        if not lines:
            continue
        tail = lines.pop()
        first_line = b"".join(parts) if length <= limit else None
        yield [first_line, *(line if len(line) <= limit else None for line in lines)]
        parts, length = [tail], len(tail)
    if length:
        yield [b"".join(parts) if length <= limit else None]
