"""The bodies of answers: decompressed within a limit, and checked to be complete.

A body is decompressed even if the server does not declare its compression.
"""

import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO, cast

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.lines import UNLIMITED, DamagedFile, decompress
from fhir_assets.fhir.transport.limits import AnswerLimits, AnswerTooLarge
from fhir_assets.retries import TransientFailure

_READ_BYTES = 1 << 18
_MAGIC_BYTES = 2
_GZIP_NAMES = frozenset({"gzip", "x-gzip"})
_BOM = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"
MAX_VALUES = 2_000_000
"""The maximum number of objects, lists and members in an answer: 50 KiB of JSON can need a hundred times its size."""
_SMALL_BYTES = 4 * 2**20
"""A body of this size is parsed whatever it contains."""


def read_answer(read: Callable[[int], bytes]) -> bytes:
    """Read a body to its end, as it was sent. ``read(size)`` returns ``b""`` there, and enforces the limits."""
    return _join(iter(lambda: read(_READ_BYTES), b""))


def decode_answer(raw: bytes, headers: Mapping[str, str], limits: AnswerLimits) -> bytes:
    """Return the content of a body without a byte order mark.

    Raises AnswerTooLarge, TransientFailure if a compressed body is cut off or damaged, and NotFhir for an unknown
    compression.
    """
    codings = parse_encodings(headers.get("Content-Encoding"))
    if codings or raw.startswith(_GZIP_MAGIC):
        try:
            raw = _join(limit_bytes(decode_body(io.BytesIO(raw).read, codings, may_be_empty=not raw), limits))
        except DamagedFile:
            raise TransientFailure("the answer is compressed, and damaged or cut off") from None
    content = raw.removeprefix(_BOM)
    if len(content) > _SMALL_BYTES and count_values(content) > MAX_VALUES:
        raise AnswerTooLarge(
            f"the answer has more than {MAX_VALUES:,} elements", advice="ask the server for smaller pages"
        )
    return content


def count_values(content: bytes) -> int:
    """Return the maximum number of values that JSON can contain, without parsing it."""
    return 1 + sum(map(content.count, (b",", b"[", b"{")))


def limit_bytes(chunks: Iterable[bytes], limits: AnswerLimits) -> Iterator[bytes]:
    """Yield decompressed content. Raises AnswerTooLarge."""
    left = limits.bytes
    for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            raise limits.too_large()
        yield chunk


def _join(chunks: Iterable[bytes]) -> bytes:
    """Join content without a second copy of it."""
    joined = io.BytesIO()
    for chunk in chunks:
        joined.write(chunk)
    return joined.getvalue()


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
        raise NotFhir(
            f"the server answers with the Content-Encoding {unknown[0]}, which was not requested: ask its administrator"
        )
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
        chunks = decompress(cast(BinaryIO, stream), UNLIMITED) if coding in _GZIP_NAMES else _inflate(stream)
        stream = _from_chunks(chunks)
    yield from decompress(cast(BinaryIO, stream), UNLIMITED)


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
