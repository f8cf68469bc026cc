"""Split large JSON documents into elements, in memory that does not grow with the document."""

import re
from collections.abc import Iterable, Iterator

_SKIPPED = re.compile(rb'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
"""What is between two brackets, with complete strings."""
_TOKENS = re.compile(rb'"|[{\[]++|[}\]]++')
_REST_OF_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+("?)', re.DOTALL)
_OPENING = b"{["
_SEPARATORS = b" \t\r\n,"
_SPACES = re.compile(rb"\s*")


_QUOTE, _COLON = b'":'
_LONGEST_NOTED = 64
"""The longest string, in bytes, that may be one of the keys or resource types that matter here."""


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
        self.buffer = bytearray()
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
        self._string: int | None = None
        """The start of the string that is being scanned, None outside of strings."""
        self._string_end: int | None = None
        """Its end, None if it is in the next chunk."""
        self._start = 0
        """The start of the element or of the part of the Bundle that is being scanned."""
        self._key = b""
        """The last string of the document, if it is a key."""
        self._type: bytes | None = None
        """The ``resourceType`` of the document, as far as it was read."""

    def scan(self) -> Iterator[tuple[bytes, bytes]]:
        """Scan the rest of the buffer and yield the elements that end in it."""
        while (token := self._next_token()) is not None:
            start, end = token
            if self.buffer[start] == _QUOTE:
                self._note_string(start, end)
                continue
            opening = self.buffer[start] in _OPENING
            position = start
            while position < end:
                floor = self._element_depth or self._base + 1
                if self.depth > floor:
                    # Inside of an element brackets are only counted, many at a time.
                    count = end - position if opening else min(end - position, self.depth - floor)
                    self.depth += count if opening else -count
                    position += count
                    if self.depth == self._element_depth:
                        yield self._array, bytes(self.buffer[self._start : position])
                        self._start = position
                    continue
                if self.depth in (self._base, self._element_depth):
                    self._begin_value(position)
                position += 1
                if opening:
                    self._open(self.buffer[position - 1 : position], position)
                elif (document := self._close(position)) is not None:
                    yield (DOCUMENT_IN_ARRAY if self._base else DOCUMENT), document

    def drop_consumed(self, limit: int) -> None:
        """Drop the bytes of finished elements. Raises ElementTooLong if an unfinished one exceeds ``limit``."""
        if len(self.buffer) - self._start + len(self._bundle) > limit:
            raise ElementTooLong
        if self._start:
            del self.buffer[: self._start]
            self._scanned -= self._start
            if self._string is not None:
                self._string -= self._start
            if self._string_end is not None:
                self._string_end -= self._start
            self._start = 0

    def _next_token(self) -> tuple[int, int] | None:
        """Return the start and the end of the next brackets or string, None if it may go on in the next chunk.

        What was scanned of an unfinished string, or of the space after a possible key, is not scanned again.
        """
        if self._string is None:
            if not self._is_at_key:
                skipped = _SKIPPED.match(self.buffer, self._scanned)
                assert skipped is not None
                self._scanned = skipped.end()
            found = _TOKENS.search(self.buffer, self._scanned)
            if found is None:
                self._scanned = len(self.buffer)
                return None
            start, self._scanned = found.span()
            if self.buffer[start] != _QUOTE:
                return start, self._scanned
            self._string, self._string_end = start, None
        if self._string_end is None:
            rest = _REST_OF_STRING.match(self.buffer, self._scanned)
            assert rest is not None
            self._scanned = rest.end()
            if not rest[1]:
                return None
            self._string_end = self._scanned
        if self._is_at_key:
            spaces = _SPACES.match(self.buffer, self._scanned)
            assert spaces is not None
            self._scanned = spaces.end()
            if self._scanned == len(self.buffer):
                return None
        token = self._string, self._string_end
        self._string = self._string_end = None
        return token

    @property
    def _is_at_key(self) -> bool:
        """Whether a string may be a key of the document, or its resource type."""
        return self.depth == self._base + 1 and self._element_depth is None

    def _note_string(self, start: int, end: int) -> None:
        """Note a key, or the resource type."""
        if not self._is_at_key:
            return
        string = bytes(self.buffer[start:end]) if end - start <= _LONGEST_NOTED else b""
        if self.buffer[self._scanned] == _COLON:
            self._key = string
        elif self._key == b'"resourceType"':
            self._type, self._key = string, b""

    def _begin_value(self, start: int) -> None:
        """Begin or end an element or a document. Raises UnbalancedJson after anything but separators."""
        if bytes(self.buffer[self._start : start]).strip(_SEPARATORS):
            raise UnbalancedJson
        self._start = start

    def _open(self, mark: bytes | bytearray, end: int) -> None:
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

    def _close(self, end: int) -> bytes | None:
        """Handle a closing bracket outside of elements. Return the document if it ends here."""
        document = None
        self.depth -= 1
        if self.depth < 0:
            raise UnbalancedJson
        if self._element_depth is not None:
            self._element_depth = None
        elif self.depth < self._base:
            self._base, self._start = 0, end
        elif self.depth == self._base:
            document = bytes(self._bundle) + self.buffer[self._start : end]
            self._start = end
            self._bundle.clear()
            self._key, self._type = b"", None
        return document
