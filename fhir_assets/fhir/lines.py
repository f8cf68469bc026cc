"""The lines of a text file, compressed or not, in bounded memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, cast

from isal import igzip, isal_zlib

_DAMAGED = cast(tuple[type[Exception], ...], (isal_zlib.error, igzip.BadGzipFile))
_CHUNK = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"


class _Readable(Protocol):
    def read1(self, size: int, /) -> bytes: ...


class BrokenOff(Exception):
    """A compressed file ends too early or is damaged; the lines before that were given."""


def read_lines(path: Path, limit: int) -> Iterator[list[bytes | None]]:
    """The lines of a file without their line feed, by the megabyte; None stands for one longer than ``limit``.

    gzip is known by its first bytes, not by the name; members that follow one another are one file, and a byte
    order mark is left out. Raises BrokenOff, and OSError if the file cannot be read.
    """
    with path.open("rb") as file:
        compressed = file.read(2) == _GZIP_MAGIC
        file.seek(0)
        readable: _Readable = igzip.open(file) if compressed else file  # type: ignore[no-untyped-call]
        yield from _split(_chunks(readable), limit)


def _chunks(file: _Readable) -> Iterator[bytes]:
    try:
        while chunk := file.read1(_CHUNK):
            yield chunk
    except EOFError:
        raise BrokenOff("the compressed file ends before its end was written: it was cut off") from None
    except _DAMAGED:
        raise BrokenOff("the compressed file is damaged") from None


def _split(chunks: Iterator[bytes], limit: int) -> Iterator[list[bytes | None]]:
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
