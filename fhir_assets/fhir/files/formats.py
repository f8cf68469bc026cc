"""The formats of files in the landing zone, recognized by suffix and first bytes.

A format reads the bytes of a file as a stream of records, rejected inputs, deletions and visits. To add a format,
implement ``FileFormat`` and add an instance to FORMATS: a file is read by the first format that matches it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain
from typing import Protocol

from fhir_assets.fhir import containers
from fhir_assets.fhir.containers import CONTAINERS, ContainedResource, DeleteEntry, EntryReader, Pages, Part
from fhir_assets.fhir.files.json_elements import (
    DOCUMENT,
    DOCUMENT_IN_ARRAY,
    ElementTooLong,
    UnbalancedJson,
    split_elements,
)
from fhir_assets.fhir.half_surrogates import mask_half_surrogates
from fhir_assets.fhir.intake import visits_csv
from fhir_assets.fhir.intake.visits_csv import InvalidRow, Visit
from fhir_assets.fhir.json_size import MAX_VALUES, has_more_values
from fhir_assets.fhir.lines import DamagedFile, split_lines
from fhir_assets.fhir.model import UNKNOWN_TYPE, known_resource_type
from fhir_assets.fhir.record import (
    Deletion,
    MalformedResource,
    Record,
    RejectedInput,
    ResourceHeader,
    build_record,
    read_header,
    to_single_line,
)

FileItem = Record | RejectedInput | Deletion | Visit

HEAD_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class LandedContent:
    """The decompressed bytes of a file.

    ``label`` names the file in dead letters instead of its file name, which may contain a patient's name. ``chunks``
    can be read once; ``reopen`` reads them again, for references to later entries of a Bundle. ``arrived`` is the time
    at which the file was written; ``limit`` is the maximum size of one resource in bytes.
    """

    label: str
    chunks: Iterator[bytes]
    arrived: datetime
    limit: int
    received: datetime | None = None
    """The time at which the file is read; None if it is read when it is written."""
    reopen: Callable[[], Iterator[bytes]] | None = None
    max_values: int = MAX_VALUES
    """The maximum number of JSON values of one resource, or of one container that is decoded as a whole."""

    def reject(
        self, rule: str, location: str, message: str, body: bytes = b"", header: ResourceHeader | None = None
    ) -> RejectedInput:
        """Return the rejected input for a part of the file at ``location``."""
        resource_type = known_resource_type(header.resource_type) if header else UNKNOWN_TYPE
        resource_id = header.id if header else None
        return RejectedInput(resource_type, resource_id, rule, f"{self.label}:{location}", message, self.arrived, body)

    def read_resource(self, body: bytes, location: str) -> Record | RejectedInput:
        """Return the record of a resource in JSON, or the rejected input if it is not a resource."""
        body = to_single_line(body)
        if len(body) > self.limit:
            return self.reject("json", location, _TOO_LONG)
        if has_more_values(body, self.max_values):
            return self.reject("json", location, f"more than {self.max_values:,} values, the limit for one resource")
        try:
            header = read_header(body)
        except MalformedResource as error:
            return self.reject(error.rule, location, str(error), body)
        return build_record(body, header, self.arrived, received=self.received)


class FileFormat(Protocol):
    """A format of files."""

    name: str
    suffixes: tuple[str, ...]
    """The suffixes of the format's files in lower case, without ``.gz``."""

    def matches(self, name: str, head: bytes) -> bool:
        """Return whether a file with one of the suffixes and these first bytes, decompressed, has this format."""
        ...

    def read(self, content: LandedContent) -> Iterator[FileItem]:
        """Yield the content of a file. A part that cannot be used becomes a RejectedInput, not an error."""
        ...


class NdjsonFormat:
    """NDJSON (https://hl7.org/fhir/R4/nd-json.html): each line is a resource or a Bundle."""

    name = "ndjson"
    suffixes: tuple[str, ...] = (".ndjson", ".jsonl", ".json")

    def matches(self, name: str, head: bytes) -> bool:
        """Return whether a file is NDJSON. A ``.json`` file is NDJSON if one of its first two lines is a resource."""
        if not name.endswith(".json"):
            return True
        lines = [line for line in head.split(b"\n") if line.strip()]
        return len(lines) > 1 and any(_is_resource(line) for line in lines[:2])

    def read(self, content: LandedContent) -> Iterator[FileItem]:
        """Yield the resources and deletions of each line."""
        number = 0
        pages = Pages()
        for lines in split_lines(content.chunks, content.limit):
            for line in lines:
                number += 1
                if line is None:
                    yield content.reject("json", str(number), _TOO_LONG)
                elif line.strip():
                    yield from read_resources(content, line, str(number), pages)
        yield from read_parts(content, pages.unfollowed())


class JsonFormat:
    """One JSON document of any size: a resource, a Bundle of any type, Parameters, or an array of these."""

    name = "json"
    suffixes: tuple[str, ...] = (".json",)

    def matches(self, name: str, head: bytes) -> bool:
        """Return True: every file with the suffix is read as one document."""
        return True

    def read(self, content: LandedContent) -> Iterator[FileItem]:
        """Yield the resources and deletions of the document."""
        return _DocumentReader(content).read()


class _DocumentReader:
    """Reads the documents of one file of the format ``json``."""

    def __init__(self, content: LandedContent) -> None:
        self._content = content
        self._pages = Pages()
        self._document = 0
        self._entries = 0
        """The entries of the current document that were read."""
        self._found = False
        """Whether one of them contained anything."""
        self._scan_ahead: Iterator[tuple[bytes, bytes]] | None = None
        self._scanned = 0
        """The documents that ``_scan_ahead`` has passed."""

    def read(self) -> Iterator[FileItem]:
        """Yield the content of all documents."""
        content, reader = self._content, self._new_reader()
        try:
            for name, element in split_elements(content.chunks, content.limit):
                if name in (DOCUMENT, DOCUMENT_IN_ARRAY):
                    yield from read_parts(content, reader.finish(containers.read_bundle_time(element)))
                    yield from self._read_document(name, element)
                    self._document += 1
                    self._entries, self._found, reader = 0, False, self._new_reader()
                    continue
                location = f"{self._prefix}{name.decode()}[{self._entries}]"
                if has_more_values(element, content.max_values):
                    yield content.read_resource(element, location)  # a rejected input
                    self._entries += 1
                    continue
                entry = containers.decode_entry(element)
                reader.note(entry)
                for item in read_parts(content, reader.read(element, entry, location)):
                    self._found = True
                    yield item
                self._entries += 1
        except UnbalancedJson:
            yield from read_parts(content, reader.finish(None))
            yield content.reject("json", "document", f"not JSON: cut off or unbalanced after {self._count}")
        except ElementTooLong:
            yield from read_parts(content, reader.finish(None))
            yield content.reject("json", "document", f"{_TOO_LONG}, after {self._count}")
        yield from read_parts(content, self._pages.unfollowed())

    @property
    def _prefix(self) -> str:
        return f"[{self._document}]." if self._document else ""

    @property
    def _count(self) -> str:
        return (
            f"{self._document} documents and {self._entries} elements"
            if self._document
            else f"{self._entries} elements"
        )

    def _new_reader(self) -> EntryReader:
        return EntryReader(self._pages, None, look_ahead=self._look_ahead if self._content.reopen else None)

    def _read_document(self, name: bytes, element: bytes) -> Iterator[FileItem]:
        location = f"[{self._document}]" if name == DOCUMENT_IN_ARRAY or self._document else "document"
        if not self._entries:
            yield from read_resources(self._content, element, location, self._pages)
        elif (header := _read_type(element)) not in CONTAINERS:
            yield self._content.reject("structure", location, _NOT_A_BUNDLE if header else "not a FHIR resource")
        elif header == "Parameters" and not self._found:
            yield self._content.read_resource(element, location)
        else:
            self._pages.add(containers.read_links(element), location)

    def _look_ahead(self) -> Iterator[bytes]:
        """Yield all entries of the current document, read again from the file."""
        assert self._content.reopen is not None
        if self._scan_ahead is None:
            self._scan_ahead = split_elements(self._content.reopen(), self._content.limit)
        try:
            for name, element in self._scan_ahead:
                if name in (DOCUMENT, DOCUMENT_IN_ARRAY):
                    self._scanned += 1
                    if self._scanned > self._document:
                        return
                elif self._scanned == self._document:
                    yield element
        except (UnbalancedJson, ElementTooLong, DamagedFile):
            return  # the file is read up to the same place, where the damage is reported


class VisitsCsvFormat:
    """CSV with one visit in each row (``fhir/intake/visit.schema.json``)."""

    name = "visits"
    suffixes: tuple[str, ...] = (".csv",)

    def matches(self, name: str, head: bytes) -> bool:
        """Return True: every file with the suffix holds visits."""
        return True

    def read(self, content: LandedContent) -> Iterator[FileItem]:
        """Yield a visit or a rejected input for each row."""
        for row in visits_csv.read(content.chunks):
            location = f"{content.label}:{row.line}"
            if isinstance(row, InvalidRow):
                yield _reject_row(content, row, location)
            else:
                yield Visit(row.values, location, content.arrived)


FORMATS: tuple[FileFormat, ...] = (NdjsonFormat(), JsonFormat(), VisitsCsvFormat())
"""The formats in the order in which they are tried."""

SUFFIXES = tuple(
    dict.fromkeys(
        suffix + ending for file_format in FORMATS for ending in ("", ".gz") for suffix in file_format.suffixes
    )
)
"""The suffixes of all files that the landing zone reads."""


def is_visits_file(name: str) -> bool:
    """Return whether a file of this name contains visits. Files of visits are received in one batch."""
    return name.lower().removesuffix(".gz").endswith(VisitsCsvFormat.suffixes)


def read(name: str, content: LandedContent) -> Iterator[FileItem]:
    """Yield the content of a file. A damaged file yields the content before the damage, and a RejectedInput."""
    base = name.lower().removesuffix(".gz")
    head, rest = _read_head(content.chunks)
    matching = (
        candidate for candidate in FORMATS if base.endswith(candidate.suffixes) and candidate.matches(base, head)
    )
    file_format = next(matching, None)
    if file_format is None:
        yield content.reject("json", "document", "no format of the landing zone matches this file")
        return
    complete = replace(content, chunks=chain([head], rest))
    try:
        if len(head) < HEAD_BYTES and not head.strip() and next(rest, None) is None:
            yield content.reject("empty", "document", "the file is empty: if it should have content, write it again")
            return
        yield from file_format.read(complete)
    except DamagedFile as error:
        yield content.reject("json", "document", str(error))


def _read_head(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Return the first bytes without a byte order mark, and the remaining chunks.

    If the file is damaged within the first bytes, the remaining chunks raise the DamagedFile.
    """
    head = b""
    try:
        while len(head) < HEAD_BYTES and (more := next(chunks, b"")):
            head += more
    except DamagedFile as error:
        return head.removeprefix(_BOM), _raise_later(error)
    return head.removeprefix(_BOM), chunks


def _raise_later(error: DamagedFile) -> Iterator[bytes]:
    yield from ()
    raise error


_NOT_A_BUNDLE = "a resource with entries that is not a Bundle: send it as NDJSON"
_BOM = b"\xef\xbb\xbf"
_TOO_LONG = "longer than the limit for one resource"


def read_resources(content: LandedContent, body: bytes, location: str, pages: Pages) -> Iterator[FileItem]:
    """Yield a resource, or the contents of a container that is small enough to be decoded as a whole."""
    item = content.read_resource(body, location)
    if isinstance(item, RejectedInput) and not item.body:
        yield item  # It is beyond a limit.
        return
    # Half a surrogate pair in one entry must not make the other entries of a container unreadable.
    resource_type = item.resource_type if isinstance(item, Record) else _read_type(mask_half_surrogates(item.body))
    if resource_type not in CONTAINERS:
        yield item
        return
    yield from read_parts(content, containers.unpack(item.body, "" if location == "document" else location, pages))


def read_parts(content: LandedContent, parts: Iterator[Part]) -> Iterator[FileItem]:
    """Yield the parts of a container as the content of a file."""
    for part in parts:
        if isinstance(part, ContainedResource):
            yield content.read_resource(part.body, part.location)
        elif isinstance(part, DeleteEntry):
            target, moment = part.target, part.moment or content.arrived
            yield Deletion(target.resource_type, target.id, moment, target.version_id)
        else:
            yield content.reject(part.rule, part.location, part.message, part.body)


def _reject_row(content: LandedContent, row: InvalidRow, location: str) -> RejectedInput:
    messages = [f"{column}: {message}" if column else message for column, message in row.problems]
    issues = tuple(
        {"rule": row.rule, "severity": "error", "path": f"{location} {column}".strip(), "message": message}
        for column, message in row.problems
    )
    return RejectedInput("Encounter", None, row.rule, location, "; ".join(messages), content.arrived, row.body, issues)


def _read_type(element: bytes) -> str | None:
    try:
        return read_header(element).resource_type
    except MalformedResource:
        return None


def _is_resource(line: bytes) -> bool:
    try:
        return bool(read_header(line))
    except MalformedResource:
        return False
