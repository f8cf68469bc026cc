"""The source ``ndjson``: resources in NDJSON files, which are read once for all types.

A file whose name contains a type (``Patient.ndjson``, ``MimicPatient.000.ndjson.gz``) holds resources of that type. In
any other file the type is read from each line. A line that cannot be used becomes a RejectedInput with the name of the
file and the number of the line.
"""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fhir_assets.catalog import BY_NAME
from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.labels import DEFAULT_LABELS, ServerLabels
from fhir_assets.fhir.lines import DamagedFile, read_lines
from fhir_assets.fhir.model import known_resource_type
from fhir_assets.fhir.record import (
    MalformedResource,
    Record,
    RejectedInput,
    ResourceHeader,
    build_record,
    read_header,
    to_single_line,
)
from fhir_assets.notices import Notice, Notices
from fhir_assets.windows import LATEST, Interval, add_clamped

MAX_LINE_BYTES = 64 * 2**20

_SUFFIXES = re.compile(r"\.(?:ndjson|jsonl)(?:\.gz)?$|^[^.]+(?:\.\d+)?\.gz$", re.IGNORECASE)
_RESOURCE_TYPE = re.compile(rb'"resourceType"\s*:\s*"([A-Za-z]+)"')
_TYPE_IN_NAME = re.compile(
    rf"(?:(?<![A-Za-z])|(?<=[a-z]))(?:{'|'.join(sorted(BY_NAME, key=len, reverse=True))})(?![a-z])"
)
_ALL_TIME = Interval(None, LATEST)


@dataclass(frozen=True, slots=True)
class _File:
    """A file to read. ``name`` is its name in messages; ``types`` are the resource types in its file name."""

    path: Path
    name: str
    size: int
    modified_ns: int
    types: frozenset[str]

    @property
    def is_one_resource(self) -> bool:
        """Whether the file holds a single resource on any number of lines."""
        return self.path.name.lower().endswith((".json", ".json.gz"))


class NdjsonSource:
    """The resources of a file, of all NDJSON files in a folder and its subfolders, or of the files that match a glob.

    ``skipped`` counts, by type, the resources of the last fetch whose type is not in the catalog. A resource without
    ``lastUpdated``, or with one in the future, is dated by the modification time of its file. The methods raise
    ConfigurationError if there is no file.
    """

    name = "ndjson"
    one_pass = True

    def __init__(
        self,
        location: str,
        *,
        max_line_bytes: int = MAX_LINE_BYTES,
        labels: ServerLabels = DEFAULT_LABELS,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._location = location
        self._max_line_bytes = max_line_bytes
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

    def find_extent(self, resource_types: Sequence[str]) -> Interval | None:
        """Return the interval from the oldest resource to just after the newest, or to now if that is earlier.

        The result is cached until ``compute_state`` changes, because all files are read for it.
        """
        key = self.compute_state(), frozenset(resource_types)
        if key not in self._extents:
            self._extents[key] = self._extent(resource_types)
        return self._extents[key]

    def complete_until(self, resource_types: Sequence[str], interval: Interval) -> None:
        """Return None: the files include the present."""

    def count(self, resource_type: str, interval: Interval) -> None:
        """Return None: files do not declare their number of resources."""

    def fetch(self, resource_types: Sequence[str], interval: Interval) -> Iterator[Record | RejectedInput]:
        """Read the resources of the interval. A malformed line is dated by the modification time of its file.

        Raises ConfigurationError if a file is missing or cannot be read.
        """
        self.skipped = Counter()
        requested = dict.fromkeys(resource_types)
        for file in self._files():
            if file.types and file.types.isdisjoint(requested):
                continue
            for item in self._read(file, list(requested)):
                if _moment(item) in interval:
                    yield item

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
        root = Path(self._location).expanduser()
        if root.is_dir():
            paths = [path for path in root.rglob("*") if _SUFFIXES.search(path.name) and not path.name.startswith(".")]
        elif root.is_file():
            paths, root = [root], root.parent
        else:
            paths = [Path(match) for match in glob.glob(str(root), recursive=True)]
            root = Path(os.path.commonpath([path.parent for path in paths])) if paths else root
        files = [_describe(path, root) for path in sorted(paths) if path.is_file()]
        if files:
            return files
        if root.is_dir():
            raise ConfigurationError(f"{self._labels.base_url}: the folder {root} holds no .ndjson or .ndjson.gz file")
        raise ConfigurationError(
            f"{self._labels.base_url}: no file or folder exists, and no glob matches, at {self._location}"
        )

    def _read(self, file: _File, requested: list[str]) -> Iterator[Record | RejectedInput]:
        """Read all resources of the requested types in a file, of any time."""
        now = self._now()
        reader = _LineReader(file, requested, min(_modified_at(file), now), now, self.skipped)
        number = 0
        try:
            if file.is_one_resource:
                item = reader.read(self._read_as_line(file), None)
                if item is not None:
                    yield item
                return
            for lines in read_lines(file.path, self._max_line_bytes):
                for line in lines:
                    number += 1
                    item = reader.read(line, number)
                    if item is not None:
                        yield item
        except DamagedFile as error:
            yield reader.reject("json", number + 1, f"{error}; {number} lines were read", b"")
        except OSError as error:
            raise ConfigurationError(f"{self._labels.base_url}: {file.name} cannot be read: {error.strerror}") from None

    def _read_as_line(self, file: _File) -> bytes | None:
        """Return the content of a file on one line; None if it is longer than the limit."""
        parts: list[bytes] = []
        length = 0
        for lines in read_lines(file.path, self._max_line_bytes):
            for line in lines:
                length += len(line or b"") + 1
                if line is None or length > self._max_line_bytes:
                    return None
                parts.append(line)
        return b" ".join(parts)


class _LineReader:
    """Turns the lines of one file into records and rejected inputs."""

    def __init__(
        self, file: _File, requested: list[str], arrived: datetime, received: datetime, skipped: Counter[str]
    ) -> None:
        self._file = file
        self._requested = requested
        self._arrived = arrived
        self._received = received
        self._skipped = skipped
        self._type_of_file = next((name for name in requested if name in file.types), None)

    def read(self, line: bytes | None, number: int | None) -> Record | RejectedInput | None:
        """Return the record or the rejected input of a line; None for a blank line and for types not requested.

        ``line`` is None for a line longer than the limit; ``number`` is None for a file that is a single resource.
        """
        if line is None:
            return self.reject("json", number, "a line longer than the limit for one resource", b"")
        body = to_single_line(line)
        if not body:
            return None
        header = None
        try:
            header = read_header(body)
            if not self._is_requested(header):
                return None
            return build_record(body, header, self._arrived, received=self._received)
        except MalformedResource as error:
            name = self._guess_type(body)
            return None if name is None else self.reject(error.rule, number, str(error), body, header, name)

    def reject(
        self,
        rule: str,
        number: int | None,
        message: str,
        body: bytes,
        header: ResourceHeader | None = None,
        resource_type: str | None = None,
    ) -> RejectedInput:
        """Return the rejected input of a line."""
        path = self._file.name if number is None else f"{self._file.name}:{number}"
        name = resource_type or self._type_of_file or self._requested[0]
        return RejectedInput(name, header.id if header else None, rule, path, message, self._arrived, body)

    def _is_requested(self, header: ResourceHeader) -> bool:
        """Return whether the type is requested. Raises MalformedResource if the file name contains another type."""
        name = header.resourceType
        if self._file.types and name not in self._file.types and (name in BY_NAME or name not in self._file.path.name):
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


def _describe(path: Path, root: Path) -> _File:
    stat = path.stat()
    types = frozenset(_TYPE_IN_NAME.findall(path.name))
    return _File(path, path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns, types)


def _moment(item: Record | RejectedInput) -> datetime:
    return item.as_of if isinstance(item, Record) else item.arrived


def _modified_at(file: _File) -> datetime:
    return datetime.fromtimestamp(file.modified_ns / 1e9, UTC)
