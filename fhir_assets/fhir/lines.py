"""The lines of a text file, compressed or not, in bounded memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from isal import isal_zlib

_CHUNK = 1 << 20
_PACKED = 1 << 16
_UNPACKED = 1 << 18
_DAMAGED = cast(type[Exception], isal_zlib.error)
_GZIP = 16 + isal_zlib.MAX_WBITS
_GZIP_MAGIC = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"


class DamagedFile(Exception):
    """A compressed file ends too early or is damaged; the lines before that were given."""


def read_lines(path: Path, limit: int) -> Iterator[list[bytes | None]]:
    """The lines of a file without their line feed, a good many at a time; None stands for one longer than ``limit``.

    gzip is known by its first bytes, not by the name; members that follow one another are one file, and a byte
    order mark is left out. Raises BrokenOff, and OSError if the file cannot be read.
    """
    with path.open("rb") as file:
        yield from split_lines(decompress(file), limit)


def decompress(file: BinaryIO) -> Iterator[bytes]:
    """The content of a stream, which need not be seekable, in pieces; gzip is known by its first bytes.

    Raises BrokenOff.
    """
    head = file.read(len(_GZIP_MAGIC))
    if head == _GZIP_MAGIC:
        yield from _unpacked(head + file.read(_PACKED), file)
        return
    if head:
        yield head + file.read(_CHUNK)
    while chunk := file.read(_CHUNK):
        yield chunk


def _unpacked(packed: bytes, file: BinaryIO) -> Iterator[bytes]:
    """The content of gzip members, in small pieces: whatever came before a missing end is given."""
    while packed:
        member = isal_zlib.decompressobj(wbits=_GZIP)
        while not member.eof:
            packed = member.unconsumed_tail or packed or file.read(_PACKED)
            try:
                piece = member.decompress(packed, _UNPACKED)
            except _DAMAGED:
                raise DamagedFile("the compressed file is damaged") from None
            if piece:
                yield piece
            elif not packed:
                raise DamagedFile("the compressed file ends before its end was written: it was cut off")
            packed = b""
        packed = _next_member(member.unused_data, file)


def _next_member(rest: bytes, file: BinaryIO) -> bytes:
    """What follows a member, without the zeros that tapes and block devices leave."""
    while not (rest := rest.lstrip(b"\0")):
        if not (rest := file.read(_PACKED)):
            break
    return rest


def split_lines(chunks: Iterable[bytes], limit: int) -> Iterator[list[bytes | None]]:
    """The lines of a content without their line feed; None stands for one longer than ``limit``."""
    held: list[bytes] = []
    length = 0
    first = True
    for chunk in chunks:
        head, *lines = (chunk.removeprefix(_BOM) if first else chunk).split(b"\n")
        first = False
        length += len(head)
        if length <= limit:
            held.append(head)
        else:
            held.clear()
        if not lines:
            continue
        tail = lines.pop()
        whole = b"".join(held) if length <= limit else None
        yield [whole, *(line if len(line) <= limit else None for line in lines)]
        held, length = [tail], len(tail)
    if length:
        yield [b"".join(held) if length <= limit else None]
