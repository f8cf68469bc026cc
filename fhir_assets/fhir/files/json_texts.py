"""The JSON texts of files that a person passes to a command: NDJSON, or one document on any number of lines.

The landing zone and the source ``ndjson`` have rules of their own (``formats``, ``ndjson``), which suit large files.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import msgspec

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.lines import DamagedFile, read_lines
from fhir_assets.fhir.record import MalformedResource, read_header
from fhir_assets.local_files import SPECIAL

MAX_TEXT_BYTES = 1 << 30
"""The maximum size of a JSON text, which must fit into memory."""

_LINES = (".ndjson", ".jsonl")
_SUFFIXES = tuple(suffix + ending for suffix in (*_LINES, ".json") for ending in ("", ".gz"))


@dataclass(frozen=True, slots=True)
class JsonText:
    """A JSON text, not yet parsed, and the number of its first line, counted from 1."""

    line: int
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class UnreadableText:
    """A part of a file that cannot be read. ``message`` gives the reason, without content of the file."""

    line: int
    message: str


_Line = JsonText | UnreadableText


def find_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files among ``paths``, and the NDJSON and JSON files in the folders among them.

    Raises NotFhir if a path does not exist or cannot be read, or if a folder contains no such file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.name.lower().endswith(_SUFFIXES))
            if not found:
                raise NotFhir(f"{path}: cannot be read: the folder contains no .ndjson or .json file")
            for file in found:
                if file.exists() and not (file.is_file() or file.is_dir()):
                    raise NotFhir(f"{file}: cannot be read: it is {SPECIAL}")  # it could have no end
            files += found
        else:
            files.append(path)
    for file in files:
        try:
            file.stat()
            if file.is_file():
                file.open("rb").close()
        except OSError as error:
            raise NotFhir(f"{file}: cannot be read: {error.strerror}: check its path and its permissions") from None
    return files


def read_json_texts(file: Path, limit: int = MAX_TEXT_BYTES) -> Iterator[JsonText | UnreadableText]:
    """Yield the JSON texts of a file, gzipped or not. Blank lines are skipped.

    The file is NDJSON if one of its first two lines is a resource. It is also NDJSON if it is not one JSON text, and
    its name or one of its lines indicates NDJSON. A line of more than ``limit`` bytes, and the end of a damaged file,
    are yielded as unreadable; the lines before and after them are read.
    """
    lines = _number_lines(file, limit)
    first = list(islice(lines, 2))
    if any(_is_resource(line) for line in first):
        yield from chain(first, lines)
        return
    first += lines
    document = _join(first)
    if document is None or (not _is_json(document.body) and _contains_lines(file, first)):
        yield from first
    else:
        yield document


def _number_lines(file: Path, limit: int) -> Iterator[_Line]:
    number = 0
    try:
        for lines in read_lines(file, limit):
            for line in lines:
                number += 1
                if line is None:
                    yield UnreadableText(number, f"the line is longer than {limit:,} bytes")
                elif text := line.strip():
                    yield JsonText(number, text)
    except (DamagedFile, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        yield UnreadableText(number + 1, f"{reason}; {number} lines before were read")


def _join(lines: list[_Line]) -> JsonText | None:
    """Return the lines as one text; None if there is none, or if a part of it is unreadable."""
    texts = [line for line in lines if isinstance(line, JsonText)]
    if not texts or len(texts) < len(lines):
        return None
    return JsonText(texts[0].line, b"\n".join(text.body for text in texts))


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _is_resource(line: _Line) -> bool:
    if not isinstance(line, JsonText):
        return False
    try:
        return bool(read_header(line.body))
    except MalformedResource:
        return False


def _contains_lines(file: Path, lines: list[_Line]) -> bool:
    """Return whether a file that is not one JSON text is NDJSON, by its name or by one of its lines."""
    has_ndjson_name = file.name.lower().removesuffix(".gz").endswith(_LINES)
    return has_ndjson_name or any(_is_resource(line) for line in lines)
