"""Split large JSON documents into elements, in memory that does not grow with the document."""

import re
from collections.abc import Iterable, Iterator

_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)|[{}\[\]]', re.DOTALL)
_OPENING = b"{["
_SEPARATORS = b" \t\r\n,"
_COLON_OR_END = re.compile(rb"\s*(:|\Z)")


class UnbalancedJson(Exception):
    """The document ends within a value, or a closing bracket has no opening one."""


class ElementTooLong(Exception):
    """An element is longer than the limit for one resource."""


_STREAMED = {b'"entry"': (None, b'"Bundle"'), b'"parameter"': (b'"Parameters"',)}
"""The arrays that are split, by key, with the values of ``resourceType`` before the key (None: no value so far)."""

DOCUMENT = b"document"
DOCUMENT_IN_ARRAY = b"[]"


def split_elements(chunks: Iterable[bytes], limit: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the elements of a document, each with the name of the array that contains it.

    The elements of a Bundle are the objects in ``entry`` (name ``entry``), followed by the Bundle itself with an empty
    ``entry`` (name ``document``); those of Parameters are named ``parameter``. Any other object is one element (name
    ``document``). An array is a sequence of documents, each with the name ``[]``. Consecutive documents are split one
    after the other.

    Only brackets and strings are examined; errors within an element appear when it is decoded. Raises UnbalancedJson
    and ElementTooLong.
    """
    splitter = _Splitter()
    for chunk in chunks:
        splitter.buffer += chunk
        yield from splitter.scan()
        splitter.drop_consumed(limit)
    if splitter.depth or splitter.buffer.strip():
        raise UnbalancedJson


class _Splitter:
    """The state of ``split_elements``: the bytes not yet consumed, and the nesting depth after the scanned bytes."""

    def __init__(self) -> None:
        self.buffer = b""
        self.depth = 0
        self._base = 0
        """The depth at which documents begin: 1 within an array of documents."""
        self._array = b""
        """The name of the array whose elements are being scanned."""
        self._element_depth: int | None = None
        """The depth of the array that contains the elements; None outside of that array."""
        self._bundle = bytearray()
        """The part of a Bundle before its entries."""
        self._scanned = 0
        self._start = 0
        """The start of the element or of the part of the Bundle that is being scanned."""
        self._key = b""
        """The last string of the document, if it is a key."""
        self._type: bytes | None = None
        """The ``resourceType`` of the document, as far as it was read."""

    def scan(self) -> Iterator[tuple[bytes, bytes]]:
        """Scan the buffer and yield the elements that end in it."""
        buffer = self.buffer
        position = self._scanned
        for token in _TOKENS.finditer(buffer, position):
            mark = token[0][:1]
            if mark == b'"':
                if not token[1]:
                    break  # the end of the string is in the next chunk
                if self.depth == self._base + 1 and self._element_depth is None and not self._note_string(token):
                    break
                position = token.end()
                continue
            position = token.end()
            if self.depth > (self._element_depth or self._base + 1):
                self.depth += 1 if mark in _OPENING else -1
                if self.depth == self._element_depth:
                    yield self._array, buffer[self._start : position]
                    self._start = position
                continue
            if self.depth in (self._base, self._element_depth):
                self._begin_value(token.start())
            if mark in _OPENING:
                self._open(mark, position)
            elif (document := self._close(token)) is not None:
                yield (DOCUMENT_IN_ARRAY if self._base else DOCUMENT), document
        self._scanned = position

    def drop_consumed(self, limit: int) -> None:
        """Drop the bytes of finished elements. Raises ElementTooLong if an unfinished one exceeds ``limit``."""
        if len(self.buffer) - self._start + len(self._bundle) > limit:
            raise ElementTooLong
        if self._start:
            self.buffer = self.buffer[self._start :]
            self._scanned -= self._start
            self._start = 0

    def _note_string(self, token: re.Match[bytes]) -> bool:
        """Note a key, or the resource type. Return False if this can only be decided with the next chunk."""
        following = _COLON_OR_END.match(self.buffer, token.end())
        if following is not None and not following[1]:
            return False
        if following is not None:
            self._key = token[0]
        elif self._key == b'"resourceType"':
            self._type, self._key = token[0], b""
        return True

    def _begin_value(self, start: int) -> None:
        """Begin or end an element or a document. Raises UnbalancedJson after anything but separators."""
        if self.buffer[self._start : start].strip(_SEPARATORS):
            raise UnbalancedJson
        self._start = start

    def _open(self, mark: bytes, end: int) -> None:
        """Handle an opening bracket outside of elements, or of an element itself."""
        if self.depth == 0 and mark == b"[":
            self._base, self._start = 1, end
        elif (
            self.depth == self._base + 1
            and mark == b"["
            and self._element_depth is None
            and self._type in _STREAMED.get(self._key, ())
        ):
            self._element_depth = self._base + 2
            self._array = self._key.strip(b'"')
            self._bundle += self.buffer[self._start : end]
            self._start = end
        self.depth += 1
        self._key = b""

    def _close(self, token: re.Match[bytes]) -> bytes | None:
        """Handle a closing bracket outside of elements. Return the document if it ends here."""
        document = None
        self.depth -= 1
        if self.depth < 0:
            raise UnbalancedJson
        if self._element_depth is not None:
            self._element_depth = None
        elif self.depth < self._base:
            self._base, self._start = 0, token.end()
        elif self.depth == self._base:
            document = bytes(self._bundle) + self.buffer[self._start : token.end()]
            self._start = token.end()
            self._bundle.clear()
            self._key, self._type = b"", None
        return document
