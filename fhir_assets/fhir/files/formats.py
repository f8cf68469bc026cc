"""The formats of files in the landing zone, recognized by suffix and first bytes.

A format reads the bytes of a file as a stream of records, rejected inputs, deletions and visits. To add a format,
implement ``FileFormat`` and add an instance to FORMATS: a file is read by the first format that matches it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Protocol

import msgspec

from fhir_assets.fhir.files.json_elements import ElementTooLong, UnbalancedJson, split_elements
from fhir_assets.fhir.intake import visits_csv
from fhir_assets.fhir.intake.visits_csv import InvalidRow, Visit
from fhir_assets.fhir.lines import DamagedFile, split_lines
from fhir_assets.fhir.model import UNKNOWN_TYPE, known_resource_type
from fhir_assets.fhir.record import (
    Deletion,
    MalformedResource,
    Record,
    RejectedInput,
    ResourceHeader,
    build_record,
    parse_instant,
    read_header,
    to_single_line,
)

FileItem = Record | RejectedInput | Deletion | Visit

HEAD_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class LandedContent:
    """The decompressed bytes of a file.

    ``label`` names the file in dead letters instead of its file name, which may contain a patient's name. ``chunks``
    can be read once. ``arrived`` is the time at which the file was written; ``limit`` is the maximum size of one
    resource in bytes.
    """

    label: str
    chunks: Iterator[bytes]
    arrived: datetime
    limit: int
    received: datetime | None = None
    """The time at which the file is read; None if it is read when it is written."""

    def reject(
        self, rule: str, location: str, message: str, body: bytes = b"", header: ResourceHeader | None = None
    ) -> RejectedInput:
        """Return the rejected input for a part of the file at ``location``."""
        resource_type = known_resource_type(header.resourceType) if header else UNKNOWN_TYPE
        resource_id = header.id if header else None
        return RejectedInput(resource_type, resource_id, rule, f"{self.label}:{location}", message, self.arrived, body)

    def read_resource(self, body: bytes, location: str) -> FileItem:
        """Return the record of a resource in JSON, or the rejected input if it is not a resource."""
        body = to_single_line(body)
        if len(body) > self.limit:
            return self.reject("json", location, _TOO_LONG)
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
        for lines in split_lines(content.chunks, content.limit):
            for line in lines:
                number += 1
                if line is None:
                    yield content.reject("json", str(number), _TOO_LONG)
                elif line.strip():
                    yield from _read_resources(content, line, str(number))


class JsonFormat:
    """One JSON document of any size: a resource, a Bundle of any type, or an array of resources."""

    name = "json"
    suffixes: tuple[str, ...] = (".json",)

    def matches(self, name: str, head: bytes) -> bool:
        """Return True: every file with the suffix is read as one document."""
        return True

    def read(self, content: LandedContent) -> Iterator[FileItem]:
        """Yield the resources and deletions of the document."""
        number = 0
        try:
            for array_name, element in split_elements(content.chunks, content.limit):
                if array_name == b"entry":
                    yield from _read_entry(content, element, f"entry[{number}]", None)
                    number += 1
                elif array_name is None:
                    if not number:
                        yield from _read_resources(content, element, "document")
                    elif not _is_bundle(element):
                        yield content.reject("structure", "document", _NOT_A_BUNDLE)
                    number = 0
                else:
                    yield content.read_resource(element, f"[{number}]")
                    number += 1
        except UnbalancedJson:
            yield content.reject("json", "document", f"not JSON: cut off or unbalanced after {number} elements")
        except ElementTooLong:
            yield content.reject("json", "document", f"{_TOO_LONG}, after {number} elements")


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
    complete = LandedContent(content.label, chain([head], rest), content.arrived, content.limit)
    try:
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


class _Request(msgspec.Struct):
    method: str = ""
    url: str = ""


class _Response(msgspec.Struct):
    lastModified: str | None = None  # noqa: N815
    etag: str | None = None


class _Entry(msgspec.Struct):
    resource: msgspec.Raw = msgspec.Raw(b"null")
    request: _Request | None = None
    response: _Response | None = None


class _Bundle(msgspec.Struct):
    resourceType: str = ""  # noqa: N815
    timestamp: str | None = None
    entry: list[msgspec.Raw] = []


_decode_entry = msgspec.json.Decoder(_Entry).decode
_decode_bundle = msgspec.json.Decoder(_Bundle).decode
_NOT_A_BUNDLE = "a resource with entries that is not a Bundle: send it as NDJSON"
_BOM = b"\xef\xbb\xbf"
_TOO_LONG = "longer than the limit for one resource"


def _read_resources(content: LandedContent, body: bytes, location: str) -> Iterator[FileItem]:
    """Yield a resource, or the entries of a Bundle that is small enough to be decoded as a whole."""
    item = content.read_resource(body, location)
    if not isinstance(item, Record) or item.resource_type != "Bundle":
        yield item
        return
    try:
        bundle = _decode_bundle(item.body)
    except msgspec.MsgspecError:
        yield content.reject("structure", location, "not a valid Bundle", body)
        return
    for number, entry in enumerate(bundle.entry):
        yield from _read_entry(content, bytes(entry), f"{location}.entry[{number}]", parse_instant(bundle.timestamp))


def _read_entry(content: LandedContent, body: bytes, location: str, bundle_time: datetime | None) -> Iterator[FileItem]:
    """Yield the resource of an entry of a Bundle, or the deletion that the entry requests."""
    try:
        entry = _decode_entry(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        yield content.reject("json", location, "not JSON, or not a valid Bundle entry", body)
        return
    if entry.request is not None and entry.request.method == "DELETE":
        yield _read_deletion(content, entry, body, location, bundle_time)
    elif bytes(entry.resource) != b"null":
        yield content.read_resource(bytes(entry.resource), location)


def _read_deletion(
    content: LandedContent, entry: _Entry, body: bytes, location: str, bundle_time: datetime | None
) -> Deletion | RejectedInput:
    """Return the deletion that an entry requests, at the time of the entry, else the Bundle, else the file."""
    assert entry.request
    resource_type, _, resource_id = entry.request.url.strip("/").partition("/")
    if not resource_type.isalpha() or not resource_id or "/" in resource_id or "?" in resource_id:
        return content.reject(
            "structure", location, "a DELETE that does not name a single resource as <type>/<id>", body
        )
    entry_time = parse_instant(entry.response.lastModified) if entry.response else None
    return Deletion(resource_type, resource_id, entry_time or bundle_time or content.arrived)


def _reject_row(content: LandedContent, row: InvalidRow, location: str) -> RejectedInput:
    messages = [f"{column}: {message}" if column else message for column, message in row.problems]
    issues = tuple(
        {"rule": row.rule, "severity": "error", "path": f"{location} {column}".strip(), "message": message}
        for column, message in row.problems
    )
    return RejectedInput("Encounter", None, row.rule, location, "; ".join(messages), content.arrived, row.body, issues)


def _is_bundle(element: bytes) -> bool:
    try:
        return read_header(element).resourceType == "Bundle"
    except MalformedResource:
        return False


def _is_resource(line: bytes) -> bool:
    try:
        return bool(read_header(line))
    except MalformedResource:
        return False
