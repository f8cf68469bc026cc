"""What a landed file may be: a format a kind of file, told apart by suffix and first bytes.

A format turns the bytes of a file into records, rejected pieces and deletions, streamed. To teach the landing zone
another one, write a ``FileFormat`` and put it into FORMATS: the first that fits a file reads it.
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
    """The unpacked bytes of a file. ``place`` names it in dead letters; its name may hold a patient's, and stays out.

    ``chunks`` may be asked for once. ``arrived`` is when the file was written; ``limit`` the size of one resource.
    """

    place: str
    chunks: Iterator[bytes]
    arrived: datetime
    limit: int

    def rejected(
        self, rule: str, where: str, message: str, body: bytes = b"", header: ResourceHeader | None = None
    ) -> RejectedInput:
        """A piece that cannot be used; ``where`` it stands in the file."""
        resource_type = known_resource_type(header.resourceType) if header else UNKNOWN_TYPE
        identity = header.id if header else None
        return RejectedInput(resource_type, identity, rule, f"{self.place}:{where}", message, self.arrived, body)

    def resource(self, body: bytes, where: str) -> FileItem:
        """The record of a resource's JSON, or why it is none."""
        body = to_single_line(body)
        if len(body) > self.limit:
            return self.rejected("json", where, _TOO_LONG)
        try:
            header = read_header(body)
        except MalformedResource as error:
            return self.rejected(error.rule, where, str(error), body)
        return build_record(body, header, self.arrived)


class FileFormat(Protocol):
    """One kind of file."""

    name: str
    suffixes: tuple[str, ...]
    """How the names of such files end, in small letters, without ``.gz``."""

    def fits(self, name: str, head: bytes) -> bool:
        """Whether a file of one of the suffixes, with these first bytes (unpacked), is of this format."""
        ...

    def read(self, content: LandedContent) -> Iterator[FileItem]:
        """What the file holds. What cannot be used is Rejected, not an error."""
        ...


class NdjsonFormat:
    """A resource a line (https://hl7.org/fhir/R4/nd-json.html), or a Bundle a line, as a bulk export lists deletes."""

    name = "ndjson"
    suffixes: tuple[str, ...] = (".ndjson", ".jsonl", ".json")

    def fits(self, name: str, head: bytes) -> bool:
        if not name.endswith(".json"):
            return True
        lines = [line for line in head.split(b"\n") if line.strip()]
        return len(lines) > 1 and any(_is_resource(line) for line in lines[:2])

    def read(self, content: LandedContent) -> Iterator[FileItem]:
        number = 0
        for lines in split_lines(content.chunks, content.limit):
            for line in lines:
                number += 1
                if line is None:
                    yield content.rejected("json", str(number), _TOO_LONG)
                elif line.strip():
                    yield from _resources(content, line, str(number))


class JsonFormat:
    """One JSON document, of any size: a resource, a Bundle of any type, or an array of resources."""

    name = "json"
    suffixes: tuple[str, ...] = (".json",)

    def fits(self, name: str, head: bytes) -> bool:
        return True

    def read(self, content: LandedContent) -> Iterator[FileItem]:
        number = 0
        try:
            for held_by, element in split_elements(content.chunks, content.limit):
                if held_by == b"entry":
                    yield from _entry(content, element, f"entry[{number}]", None)
                    number += 1
                elif held_by is None:
                    if not number:
                        yield from _resources(content, element, "document")
                    elif not _is_bundle(element):
                        yield content.rejected("structure", "document", _NO_BUNDLE)
                    number = 0
                else:
                    yield content.resource(element, f"[{number}]")
                    number += 1
        except UnbalancedJson:
            yield content.rejected("json", "document", f"not JSON: cut off, or unbalanced, after {number} elements")
        except ElementTooLong:
            yield content.rejected("json", "document", f"{_TOO_LONG}, after {number} elements")


class VisitsCsvFormat:
    """Visits, a row each (``fhir/intake/visit.schema.json``)."""

    name = "visits"
    suffixes: tuple[str, ...] = (".csv",)

    def fits(self, name: str, head: bytes) -> bool:
        return True

    def read(self, content: LandedContent) -> Iterator[FileItem]:
        for row in visits_csv.read(content.chunks):
            place = f"{content.place}:{row.line}"
            if isinstance(row, InvalidRow):
                yield _bad_row(content, row, place)
            else:
                yield Visit(row.values, place, content.arrived)


FORMATS: tuple[FileFormat, ...] = (NdjsonFormat(), JsonFormat(), VisitsCsvFormat())
"""In the order in which they are asked."""

SUFFIXES = tuple({suffix: None for each in FORMATS for suffix in (*each.suffixes, *(f"{s}.gz" for s in each.suffixes))})
"""How the names of all files end that are looked at."""


def is_visits_file(name: str) -> bool:
    """Whether a file by its name is one of visits: those are received together."""
    return name.lower().removesuffix(".gz").endswith(VisitsCsvFormat.suffixes)


def read(name: str, content: LandedContent) -> Iterator[FileItem]:
    """What a landed file holds; a file that breaks off gives what came before that, and a Rejected."""
    base = name.lower().removesuffix(".gz")
    head, rest = _begun(content.chunks)
    fitting = (each for each in FORMATS if base.endswith(each.suffixes) and each.fits(base, head))
    found = next(fitting, None)
    if found is None:
        yield content.rejected("json", "document", "no format of the landing zone fits this file")
        return
    whole = LandedContent(content.place, chain([head], rest), content.arrived, content.limit)
    try:
        yield from found.read(whole)
    except DamagedFile as error:
        yield content.rejected("json", "document", str(error))


def _begun(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first bytes without a byte order mark, and the rest, which raises BrokenOff where they do."""
    head = b""
    try:
        while len(head) < HEAD_BYTES and (more := next(chunks, b"")):
            head += more
    except DamagedFile as error:
        return head.removeprefix(_BOM), _breaking(error)
    return head.removeprefix(_BOM), chunks


def _breaking(error: DamagedFile) -> Iterator[bytes]:
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
_NO_BUNDLE = "a resource with entries that is no Bundle: give it as NDJSON"
_BOM = b"\xef\xbb\xbf"
_TOO_LONG = "longer than a resource may be"


def _resources(content: LandedContent, body: bytes, where: str) -> Iterator[FileItem]:
    """A resource, or the entries of a Bundle that is small enough to be read whole."""
    item = content.resource(body, where)
    if not isinstance(item, Record) or item.resource_type != "Bundle":
        yield item
        return
    try:
        bundle = _decode_bundle(item.body)
    except msgspec.MsgspecError:
        yield content.rejected("structure", where, "not a Bundle as FHIR has them", body)
        return
    for number, entry in enumerate(bundle.entry):
        yield from _entry(content, bytes(entry), f"{where}.entry[{number}]", parse_instant(bundle.timestamp))


def _entry(content: LandedContent, body: bytes, where: str, bundle_time: datetime | None) -> Iterator[FileItem]:
    """An entry of a Bundle: its resource, or the deletion that it asks for."""
    try:
        entry = _decode_entry(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        yield content.rejected("json", where, "an entry that is no JSON, or not as a Bundle has them", body)
        return
    if entry.request is not None and entry.request.method == "DELETE":
        yield deletion(content, entry, body, where, bundle_time)
    elif bytes(entry.resource) != b"null":
        yield content.resource(bytes(entry.resource), where)


def deletion(
    content: LandedContent, entry: _Entry, body: bytes, where: str, bundle_time: datetime | None
) -> Deletion | RejectedInput:
    """The deletion of an entry, at the time that it says, else its Bundle, else of the file."""
    assert entry.request
    resource_type, _, identity = entry.request.url.strip("/").partition("/")
    if not resource_type.isalpha() or not identity or "/" in identity or "?" in identity:
        return content.rejected("structure", where, "a DELETE that names no single resource as <type>/<id>", body)
    said = parse_instant(entry.response.lastModified) if entry.response else None
    return Deletion(resource_type, identity, said or bundle_time or content.arrived)


def _bad_row(content: LandedContent, row: InvalidRow, place: str) -> RejectedInput:
    said = [f"{column}: {what}" if column else what for column, what in row.problems]
    issues = tuple(
        {"rule": row.rule, "severity": "error", "path": f"{place} {column}".strip(), "message": what}
        for column, what in row.problems
    )
    return RejectedInput("Encounter", None, row.rule, place, "; ".join(said), content.arrived, row.body, issues)


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
