"""The source ``ndjson``: resources in NDJSON and JSON files, which are read once for all types.

A file of lines whose name contains a type (``Patient.ndjson``, ``MimicPatient.000.ndjson.gz``) holds resources of that
type. In any other file the type is read from each resource. A line, or a ``.json`` file, may be a container: a Bundle
or Parameters. Content that cannot be used becomes a RejectedInput with the name of the file and the location in it.
"""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType

from fhir_assets.catalog import BY_NAME
from fhir_assets.control_characters import escape_control_characters
from fhir_assets.errors import ConfigurationError, ServerRefused
from fhir_assets.fhir.containers import CONTAINERS, Pages
from fhir_assets.fhir.files import formats
from fhir_assets.fhir.files.formats import FileItem, LandedContent
from fhir_assets.fhir.files.rejected_parts import limit_rejected
from fhir_assets.fhir.json_size import MAX_VALUES
from fhir_assets.fhir.labels import DEFAULT_LABELS, ServerLabels
from fhir_assets.fhir.lines import DEFAULT_LIMITS, DamagedFile, FileLimits, decompress, split_lines
from fhir_assets.fhir.model import known_resource_type
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
from fhir_assets.local_files import FoundFile, find_readable, open_file
from fhir_assets.notices import Notice, Notices
from fhir_assets.windows import LATEST, Interval, add_clamped

MAX_LINE_BYTES = 64 * 2**20

_SUFFIXES = re.compile(r"\.(?:ndjson|jsonl|json)(?:\.gz)?$|^[^.]+(?:\.\d+)?\.gz$", re.IGNORECASE)
_RESOURCE_TYPE = re.compile(rb'"resourceType"\s*:\s*"([A-Za-z]+)"')
_TYPE_IN_NAME = re.compile(
    rf"(?:(?<![A-Za-z])|(?<=[a-z]))(?:{'|'.join(sorted(BY_NAME, key=len, reverse=True))})(?![a-z])"
)
_is_manifest = re.compile(rb'\s*\{(?:(?!"resourceType").)*"transactionTime"', re.DOTALL).match
"""Whether JSON begins like the manifest of a bulk export, which is often in the same folder as its files."""

_DELETION = "a deletion, which a source of files cannot express: give the file to the landing zone"
_ALL_TIME = Interval(None, LATEST)


@dataclass(frozen=True, slots=True)
class _File:
    """A file to read. ``name`` is its path, escaped; ``types`` are the types in the name of a file of lines."""

    root: Path
    path: str
    """Its path below ``root``."""
    name: str
    size: int
    modified_ns: int
    types: frozenset[str]

    @property
    def is_document(self) -> bool:
        """Whether the file is a JSON document on any number of lines, rather than lines."""
        return _is_document(self.path)

    def read(self, limits: FileLimits = DEFAULT_LIMITS) -> Iterator[bytes]:
        """Yield the content in pieces, decompressed. Raises OSError and DamagedFile."""
        with open_file(self.root, self.path, OSError) as stream:
            yield from decompress(stream, limits)


class NdjsonSource:
    """The resources of a file, of all NDJSON and JSON files in a folder and its subfolders, or of a glob.

    ``skipped`` counts, by type, the resources of the last fetch whose type is not in the catalog. A resource without
    ``lastUpdated``, or with one in the future, is dated by the modification time of its file. The methods raise
    ConfigurationError if there is no file.
    """

    name = "ndjson"
    one_pass = True
    refused: Mapping[str, ServerRefused] = MappingProxyType({})

    def __init__(
        self,
        location: str,
        *,
        max_line_bytes: int = MAX_LINE_BYTES,
        max_values: int = MAX_VALUES,
        file_limits: FileLimits = DEFAULT_LIMITS,
        labels: ServerLabels = DEFAULT_LABELS,
        name_file: Callable[[str], str] = str,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Create the source. ``name_file`` returns what messages and dead letters call a file, given its name."""
        self._location = location
        self._name_file = name_file
        self._max_line_bytes = max_line_bytes
        self._max_values = max_values
        self._file_limits = file_limits
        self._labels = labels
        self._now = now
        self._extents: dict[tuple[str, frozenset[str]], Interval | None] = {}
        self.skipped: Counter[str] = Counter()
        self.notices = Notices()

    def list_types(self) -> frozenset[str] | None:
        """Return the types in the names of the files; None if a file may hold any type."""
        files = self._files()
        if not all(file.types for file in files):
            return None
        return frozenset[str]().union(*(file.types for file in files))

    def compute_state(self) -> str:
        """Return a digest of the names, sizes and modification times of the files."""
        digest = hashlib.sha256()
        for file in self._files():
            digest.update(f"{file.name}\0{file.size}\0{file.modified_ns}\0".encode())
        return digest.hexdigest()[:32]

    def list_files(self) -> list[tuple[str, str]]:
        """Return the name of each file that can be read, and what messages and dead letters call it."""
        return [(file.name, self._name_file(file.name)) for file in self._files()]

    def find_extent(self, resource_types: Sequence[str]) -> Interval | None:
        """Return the interval from the oldest resource to just after the newest, or to now if that is earlier.

        The result is cached until ``compute_state`` changes, because all files are read for it.
        """
        key = self.compute_state(), frozenset(resource_types)
        if key not in self._extents:
            self._extents[key] = self._extent(resource_types)
        return self._extents[key]

    def read_clock(self) -> None:
        """Return None: files have no clock."""

    def complete_until(self, intervals: Mapping[str, Interval]) -> dict[str, datetime]:
        """Return nothing: the files include the present."""
        return {}

    def count(self, resource_type: str, interval: Interval) -> None:
        """Return None: files do not declare their number of resources."""

    def fetch(self, resource_types: Sequence[str], interval: Interval) -> Iterator[Record | RejectedInput]:
        """Read the resources of the interval. A malformed line is dated by the modification time of its file.

        Raises ConfigurationError if a file is missing or cannot be read.
        """
        self.skipped = Counter()
        requested = dict.fromkeys(resource_types)
        files, faulty = self._find_files()
        for found in faulty:
            name = self._name_file(escape_control_characters(found.name))
            self.notices.add("error", "unreadable-file", f"{name} is not read: {found.fault}")
        for file in files:
            if file.types and file.types.isdisjoint(requested):
                continue
            for item in limit_rejected(self._read(file, list(requested)), self._file_limits):
                if _moment(item) in interval:
                    yield item

    def count_all(self, resource_type: str) -> None:
        """Return None: files do not declare their number of resources."""

    def fetch_all(self, resource_type: str) -> Iterator[Record | RejectedInput]:
        """Read all resources of a type, regardless of their dates. Raises as ``fetch``."""
        yield from self.fetch([resource_type], _ALL_TIME)

    def drain_notices(self) -> tuple[Notice, ...]:
        """Return the notices about the files since the last call."""
        return self.notices.drain()

    def _extent(self, resource_types: Sequence[str]) -> Interval | None:
        first = last = None
        for item in self.fetch(resource_types, _ALL_TIME):
            moment = _moment(item)
            if first is None or moment < first:
                first = moment
            if last is None or moment > last:
                last = moment
        if first is None or last is None:
            return None
        end = min(add_clamped(last, timedelta(milliseconds=1)), self._now())
        return Interval(min(first, end), end)

    def _files(self) -> list[_File]:
        return self._find_files()[0]

    def _find_files(self) -> tuple[list[_File], list[FoundFile]]:
        """Return the files to read, and those that cannot be read."""
        root = Path(self._location).expanduser()
        faulty: list[FoundFile] = []
        if root.is_dir():
            try:
                found, faulty = find_readable(root, _SUFFIXES)
            except OSError as error:
                raise ConfigurationError(f"{self._labels.base_url}: {root} cannot be read: {error.strerror}") from None
            files = [_describe(root, file.name, file.size, file.modified_ns) for file in found]
        elif root.is_file():
            root = root.resolve()
            files = [_describe_path(root.parent, root)]
        else:
            paths = [path for path in map(Path, sorted(glob.glob(str(root), recursive=True))) if path.is_file()]
            root = Path(os.path.commonpath([path.parent for path in paths])) if paths else root
            files = [_describe_path(root, path) for path in paths]
        if files or faulty:
            return sorted(files, key=lambda file: file.path.split("/")), faulty
        if root.is_dir():
            raise ConfigurationError(
                f"{self._labels.base_url}: the folder {root} holds no .ndjson or .json file, plain or .gz"
            )
        raise ConfigurationError(
            f"{self._labels.base_url}: no file or folder exists, and no glob matches, at {self._location}"
        )

    def _read(self, file: _File, requested: list[str]) -> Iterator[Record | RejectedInput]:
        """Read all resources of the requested types in a file, regardless of their dates."""
        now = self._now()
        name = self._name_file(file.name)
        arrived = min(_modified_at(file), now)
        reader = _LineReader(file, name, requested, arrived, now, self.skipped)
        content = LandedContent(
            name,
            file.read(self._file_limits),
            arrived,
            self._max_line_bytes,
            received=now,
            reopen=lambda: file.read(self._file_limits),
            max_values=self._max_values,
        )
        number = 0
        try:
            if file.is_document:
                if not _begins_as_manifest(file):
                    yield from reader.select(formats.read(file.path, content))
                return
            pages = Pages()
            for lines in split_lines(file.read(self._file_limits), self._max_line_bytes):
                for line in lines:
                    number += 1
                    item = reader.read(line, number)
                    if item is None:
                        continue
                    if item.resource_type in CONTAINERS:
                        yield from reader.select(formats.read_resources(content, item.body, str(number), pages))
                    else:
                        yield item
            yield from reader.select(formats.read_parts(content, pages.unfollowed()))
        except DamagedFile as error:
            yield reader.reject("json", number + 1, f"{error}; {number} lines were read", b"")
        except OSError as error:
            raise ConfigurationError(
                f"{self._labels.base_url}: {name} cannot be read: {error.strerror or error}"
            ) from None


class _LineReader:
    """Turns the lines of one file into records and rejected inputs."""

    def __init__(
        self,
        file: _File,
        name: str,
        requested: list[str],
        arrived: datetime,
        received: datetime,
        skipped: Counter[str],
    ) -> None:
        self._file = file
        self._name = name
        self._requested = requested
        self._arrived = arrived
        self._received = received
        self._skipped = skipped
        self._type_of_file = next((name for name in requested if name in file.types), None)

    def read(self, line: bytes | None, number: int) -> Record | RejectedInput | None:
        """Return the record or the rejected input of a line; None for a blank line and for types not requested.

        The record may be a container. ``line`` is None for a line longer than the limit.
        """
        if line is None:
            return self.reject("json", number, "a line longer than the limit for one resource", b"")
        body = to_single_line(line)
        if not body:
            return None
        header = None
        try:
            header = read_header(body)
            if not self._is_requested(header.resource_type):
                return None
            return build_record(body, header, self._arrived, received=self._received)
        except MalformedResource as error:
            name = self._guess_type(body)
            return None if name is None else self.reject(error.rule, number, str(error), body, header, name)

    def select(self, items: Iterable[FileItem]) -> Iterator[Record | RejectedInput]:
        """Yield the requested resources, and the rejected inputs, among the content of a container or a document."""
        for item in items:
            if isinstance(item, RejectedInput):
                if item.resource_type in self._requested:
                    yield item
                elif item.resource_type not in BY_NAME:
                    yield replace(item, resource_type=self._type_of_file or self._requested[0])
            elif isinstance(item, Record):
                try:
                    if self._is_requested(item.resource_type) and item.resource_type not in CONTAINERS:
                        yield item
                except MalformedResource as error:
                    yield self._reject_in_container(item, error.rule, str(error), item.body)
            elif isinstance(item, Deletion) and item.resource_type in self._requested:
                yield self._reject_in_container(item, "structure", _DELETION, b"")

    def _reject_in_container(self, item: Record | Deletion, rule: str, message: str, body: bytes) -> RejectedInput:
        name = self._type_of_file or self._requested[0]
        return RejectedInput(name, item.id, rule, self._name, message, self._arrived, body)

    def reject(
        self,
        rule: str,
        number: int,
        message: str,
        body: bytes,
        header: ResourceHeader | None = None,
        resource_type: str | None = None,
    ) -> RejectedInput:
        """Return the rejected input of a line."""
        path = f"{self._name}:{number}"
        name = resource_type or self._type_of_file or self._requested[0]
        return RejectedInput(name, header.id if header else None, rule, path, message, self._arrived, body)

    def _is_requested(self, name: str) -> bool:
        """Return whether the type is requested. Raises MalformedResource if the file name contains another type."""
        if name in CONTAINERS:
            return True
        if (
            self._file.types
            and name not in self._file.types
            and (name in BY_NAME or name not in self._file.path.rpartition("/")[2])
        ):
            raise MalformedResource("a resource of another type than in the file's name", "structure")
        if name in self._requested:
            return True
        if name not in BY_NAME:
            self._skipped[known_resource_type(name)] += 1
        return False

    def _guess_type(self, body: bytes) -> str | None:
        """Return the type under which to report a malformed line; None if its type is not requested."""
        if self._type_of_file is not None:
            return self._type_of_file
        match = _RESOURCE_TYPE.search(body)
        name = match[1].decode() if match else ""
        if name in BY_NAME:
            return name if name in self._requested else None
        return self._requested[0]


def _describe(root: Path, path: str, size: int, modified_ns: int) -> _File:
    types = frozenset() if _is_document(path) else frozenset(_TYPE_IN_NAME.findall(path.rpartition("/")[2]))
    return _File(root, path, escape_control_characters(path), size, modified_ns, types)


def _describe_path(root: Path, path: Path) -> _File:
    stat = path.stat()
    return _describe(root, path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns)


def _is_document(path: str) -> bool:
    return path.lower().endswith((".json", ".json.gz"))


def _begins_as_manifest(file: _File) -> bool:
    try:
        return _is_manifest(next(file.read(), b"")) is not None
    except DamagedFile:
        return False


def _moment(item: Record | RejectedInput) -> datetime:
    return item.as_of if isinstance(item, Record) else item.arrived


def _modified_at(file: _File) -> datetime:
    return datetime.fromtimestamp(file.modified_ns / 1e9, UTC)
