"""Halves of surrogate pairs in JSON, such as a half of an emoji that was cut off.

See https://www.rfc-editor.org/rfc/rfc8259#section-8.2. They are not characters, and parsers refuse a whole document
that contains one. If they are masked, a Bundle can be read, and only the resource with such a text is invalid, not the
other resources of the Bundle.
"""

import re
from collections.abc import Iterable, Iterator

import msgspec

HALF_SURROGATE_PAIR = "text with half a surrogate pair, which is not a character: correct it at the source"
"""The message of an invalid resource."""

_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
_REPLACEMENT = rb"\ufffd"


def mask_half_surrogates(document: bytes) -> bytes:
    """Return JSON of the same length without halves of surrogate pairs; the same object if there are none."""
    if b"\\ud" not in document and b"\\uD" not in document:
        return document
    masked = _ESCAPE.sub(lambda match: _REPLACEMENT if match["half"] else match[0], document)
    return document if masked == document else masked


def unmask(document: bytes, masked: bytes, values: Iterable[msgspec.Raw]) -> Iterator[bytes]:
    """Yield the original text of ``values``, which are in the order of the masked document."""
    end = 0
    for value in values:
        start = masked.index(bytes(value), end)
        end = start + len(bytes(value))
        yield document[start:end]
