"""The content of a downloaded file: decompressed, and checked to be complete."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, cast

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.lines import DamagedFile, decompress

_READ_BYTES = 1 << 18
_MAGIC_BYTES = 2
_GZIP_NAMES = frozenset({"gzip", "x-gzip"})
_ADVICE = "run again to request a new export, and ask the server's administrator if it happens again"


class _Stream:
    """A readable stream of the bytes that a function or an iterator returns."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes: at least ``_MAGIC_BYTES``, unless the stream ends before them."""
        chunk = self._rest or self._read(_READ_BYTES)
        while chunk and len(chunk) < _MAGIC_BYTES and (more := self._read(_READ_BYTES)):
            chunk += more
        self._rest = chunk[size:] if 0 <= size < len(chunk) else b""
        return chunk[:size] if self._rest else chunk


def parse_encodings(header: str | None) -> tuple[str, ...]:
    """Return the codings of a Content-Encoding header in the order in which they were applied.

    Raises NotFhir for a coding other than gzip and deflate, which no request asks for.
    """
    names = [name.strip().lower() for name in (header or "").split(",")]
    codings = tuple(name for name in names if name not in ("", "identity"))
    unknown = [name[:20] for name in codings if name not in _GZIP_NAMES and name != "deflate"]
    if unknown:
        raise NotFhir(f"an exported file has the Content-Encoding {unknown[0]}, which was not requested: {_ADVICE}")
    return codings


def decode_body(read: Callable[[int], bytes], codings: Sequence[str], *, may_be_empty: bool) -> Iterator[bytes]:
    """Yield the decompressed content of a body. A file that is itself compressed with gzip is decompressed too.

    ``read(size)`` returns at most ``size`` bytes of the body, ``b""`` at its end. An empty body counts as a truncated
    compressed stream unless ``may_be_empty``. Raises DamagedFile if a compressed stream is damaged or truncated; the
    content before the damage has been yielded.
    """
    stream = _Stream(read)
    first = stream.read()
    if not first:
        if codings and not may_be_empty:
            raise DamagedFile("the compressed file is empty: it was cut off")
        return
    stream = _prepend(first, stream)
    for coding in reversed(codings):
        chunks = decompress(cast(BinaryIO, stream)) if coding in _GZIP_NAMES else _inflate(stream)
        stream = _from_chunks(chunks)
    yield from decompress(cast(BinaryIO, stream))


def _prepend(first: bytes, stream: _Stream) -> _Stream:
    def chunks() -> Iterator[bytes]:
        yield first
        while chunk := stream.read():
            yield chunk

    return _from_chunks(chunks())


def _from_chunks(chunks: Iterator[bytes]) -> _Stream:
    return _Stream(lambda _: next((chunk for chunk in chunks if chunk), b""))


def _inflate(stream: _Stream) -> Iterator[bytes]:
    """Decompress the coding ``deflate``: the zlib format, or the bare deflate stream that some servers send."""
    chunk = stream.read()
    is_zlib = len(chunk) > 1 and chunk[0] & 15 == zlib.DEFLATED and int.from_bytes(chunk[:2], "big") % 31 == 0
    inflater = zlib.decompressobj(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)
    while not inflater.eof:
        given = inflater.unconsumed_tail or chunk or stream.read()
        chunk = b""
        try:
            piece = inflater.decompress(given, _READ_BYTES)
        except zlib.error:
            raise DamagedFile("the compressed file is damaged") from None
        if piece:
            yield piece
        elif not given and not inflater.eof:
            raise DamagedFile("the compressed file ends too early: it was cut off")
