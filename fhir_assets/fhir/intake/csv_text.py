"""The text of CSV files as spreadsheets write it: encodings, line ends, and delimiters."""

import codecs
import csv
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import chain

_HEAD_BYTES = 1 << 16
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_DELIMITERS = ",;\t|"
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?', re.IGNORECASE)


class UnreadableText(ValueError):
    """The file is not text in a known encoding. The message names what it is."""


def decode(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield text in UTF-8 with line feeds, from UTF-8 or UTF-16 with any line ends. Raises UnreadableText.

    UTF-16 is recognized by its mark or by its zero bytes. Carriage returns are line ends if the file has no line feed;
    otherwise they are kept, and the reader of rows removes those before line feeds.
    """
    source = iter(chunks)
    head = b""
    while len(head) < _HEAD_BYTES and b"\n" not in head and (chunk := next(source, b"")):
        head += chunk
    if head.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise UnreadableText("the file is a spreadsheet, not CSV: export it as CSV in UTF-8")
    encoding = _find_encoding(head)
    text: Iterator[bytes] = chain([head], source)
    if encoding:
        text = _transcode(text, encoding)
        head = next(text, b"")
        text = chain([head], text)
    if b"\n" not in head and b"\r" in head:
        text = (chunk.replace(b"\r", b"\n") for chunk in text)
    return text


def _find_encoding(head: bytes) -> str | None:
    """Return the encoding if it is not UTF-8, else None."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    even, odd = head[:1024:2].count(0), head[1:1024:2].count(0)
    if max(even, odd) * 4 > len(head[:1024]):
        return "utf-16-be" if even > odd else "utf-16-le"
    return None


def _transcode(chunks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for chunk in chunks:
            if text := decoder.decode(chunk):
                yield text.removeprefix("\ufeff").encode()
        decoder.decode(b"", final=True)
    except UnicodeError:
        raise UnreadableText(
            f"the file is not text in {encoding.upper()}, as which it begins: export it in UTF-8"
        ) from None


def read_separator_line(text: str) -> str | None:
    """Return the delimiter that the line ``sep=;`` states, None for any other line."""
    match = _SEPARATOR_LINE.fullmatch(text.strip("\r\ufeff"))
    return match[1] if match else None


def find_delimiter(header: str, columns: Collection[str]) -> str:
    """Return the delimiter that splits a header into the most of these columns."""

    def count(delimiter: str) -> int:
        try:
            row = next(csv.reader([header], delimiter=delimiter), [])
        except csv.Error:
            return 0
        return sum(name.strip().lower() in columns for name in row)

    return max(_DELIMITERS, key=count)
