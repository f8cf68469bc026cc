"""The elements of a large JSON document, one after the other, in memory that does not grow with the document."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)|[{}\[\]]', re.DOTALL)
_OPEN = b"{["
_BETWEEN = b" \t\r\n,"
_COLON = re.compile(rb"\s*:")


class UnbalancedJson(Exception):
    """The document ends in the midst of a value, or closes what was never opened."""


class ElementTooLong(Exception):
    """One element is longer than a resource may be."""


@dataclass(slots=True)
class _Place:
    """Where the reader stands: how deep, and at what depth elements lie (None: outside of their array)."""

    depth: int = 0
    element_depth: int | None = None


def split_elements(chunks: Iterable[bytes], limit: int) -> Iterator[tuple[bytes | None, bytes]]:
    """The elements of a document: of a Bundle the objects in ``entry``, of an array its objects, of any other object
    the object itself. Each comes with the name of the array that holds it: ``entry``, ``[]``, or nothing.

    Of several documents that follow one another each gives its own. What is around the entries of a Bundle comes last,
    as an object whose ``entry`` is empty. Only brackets and strings are looked at: whoever decodes an element finds
    what is wrong in it. Raises Unbalanced and TooLong.
    """
    buffer = b""
    place = _Place()
    around = bytearray()
    scanned = start = 0
    key = False
    for chunk in chunks:
        buffer += chunk
        position = scanned
        end = len(buffer)
        for token in _TOKENS.finditer(buffer, scanned):
            text = token[0]
            mark = text[:1]
            if mark == b'"':
                if not token[1]:
                    break  # its end stands in the next chunk
                if place.depth == 1 and place.element_depth is None:
                    follows = _COLON.match(buffer, token.end())
                    if follows is None and not buffer[token.end() :].strip():
                        break  # whether it is a key stands in the next chunk
                    key = text == b'"entry"' and follows is not None
                position = token.end()
                continue
            position = token.end()
            if place.depth in (0, place.element_depth):
                # Between values there is nothing but white space and commas: the rest would be lost.
                if buffer[start : token.start()].strip(_BETWEEN):
                    raise UnbalancedJson
                start = token.start()
            if mark in _OPEN:
                if place.depth == 0 and mark == b"[":
                    place.element_depth, start = 1, token.end()
                elif place.depth == 1 and key and mark == b"[" and place.element_depth is None:
                    place.element_depth = 2
                    around += buffer[start : token.end()]
                    start = token.end()
                place.depth += 1
                key = False
                continue
            place.depth -= 1
            if place.depth < 0:
                raise UnbalancedJson
            if place.element_depth is not None and place.depth == place.element_depth:
                yield (b"entry" if place.element_depth == 2 else b"[]"), buffer[start : token.end()]
                start = token.end()
            elif place.element_depth is not None and place.depth == place.element_depth - 1:
                if place.element_depth == 2:
                    start = token.start()
                place.element_depth = None
            elif place.depth == 0:
                yield None, bytes(around) + buffer[start : token.end()]
                around.clear()
            if place.depth == 0:
                start = token.end()
                around.clear()
        scanned = position
        if end - start + len(around) > limit:
            raise ElementTooLong
        if start:
            buffer, scanned, start = buffer[start:], scanned - start, 0
    if place.depth or buffer.strip():
        raise UnbalancedJson
