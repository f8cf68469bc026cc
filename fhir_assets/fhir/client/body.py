"""Bodies of responses: decompressed even if the server does not declare the compression, without a byte order mark."""

from typing import cast

from isal import isal_zlib

from fhir_assets.retries import TransientFailure

_BOM = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_ERROR = cast(type[Exception], isal_zlib.error)
_GZIP_WINDOW = 16 + isal_zlib.MAX_WBITS


def clean_body(body: bytes) -> bytes:
    """Return a body without a byte order mark, decompressed if it is gzip without a Content-Encoding header.

    Raises TransientFailure if the compressed body is cut off or damaged.
    """
    if body.startswith(_GZIP_MAGIC):
        body = _decompress(body)
    return body.removeprefix(_BOM)


def _decompress(body: bytes) -> bytes:
    pieces = []
    while body:
        member = isal_zlib.decompressobj(wbits=_GZIP_WINDOW)
        try:
            pieces.append(member.decompress(body))
        except _GZIP_ERROR:
            raise TransientFailure("the answer is damaged gzip") from None
        if not member.eof:
            raise TransientFailure("the answer is gzip that broke off before its end")
        body = member.unused_data.lstrip(b"\0")
    return b"".join(pieces)
