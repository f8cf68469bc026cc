"""The source ``ndjson``: resources in files, one a line, read once for all types.

A file that is named for a type (``Patient.ndjson``, ``MimicPatient.000.ndjson.gz``) holds that type; in any other
file each line speaks for itself. Lines that cannot be used are Rejected, under file name and line number.
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
from fhir_assets.windows import Interval

MAX_LINE_BYTES = 64 * 2**20

_SUFFIXES = re.compile(r"\.(?:ndjson|jsonl)(?:\.gz)?$|^[^.]+(?:\.\d+)?\.gz$", re.IGNORECASE)
_RESOURCE_TYPE = re.compile(rb'"resourceType"\s*:\s*"([A-Za-z]+)"')
_TYPE_IN_NAME = re.compile(
    rf"(?:(?<![A-Za-z])|(?<=[a-z]))(?:{'|'.join(sorted(BY_NAME, key=len, reverse=True))})(?![a-z])"
)
_ALWAYS = Interval(None, datetime.max.replace(tzinfo=UTC))


@dataclass(frozen=True, slots=True)
class _File:
    """A file to read: ``name`` as messages show it, ``types`` the resource types it is named for."""

    path: Path
    name: str
    size: int
    modified_ns: int
    types: frozenset[str]

    @property
    def is_one_resource(self) -> bool:
        return self.path.name.lower().endswith((".json", ".json.gz"))


class NdjsonSource:
    """The resources of a file, of all NDJSON files in a folder and below it, or of the files that a glob matches.

    ``skipped`` counts, by type, the resources of the last fetch whose type the catalog does not know. A resource
    without ``lastUpdated`` arrived when its file was written. Raises ConfigurationError if there is no such file.
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

    def offered(self) -> frozenset[str] | None:
        """The types that the files are named for; None if one of them may hold any type."""
        files = self._files()
        if not all(file.types for file in files):
            return None
        return frozenset[str]().union(*(file.types for file in files))

    def state(self) -> str:
        """A digest of the files' names, sizes and times."""
        digest = hashlib.sha256()
        for file in self._files():
            digest.update(f"{file.name}\0{file.size}\0{file.modified_ns}\0".encode())
        return digest.hexdigest()[:32]

    def extent(self, resource_types: Sequence[str]) -> Interval | None:
        """From the oldest resource to just after the newest, or to now; reads the files, once a state of theirs."""
        key = self.state(), frozenset(resource_types)
        if key not in self._extents:
            self._extents[key] = self._extent(resource_types)
        return self._extents[key]

    def until(self, resource_types: Sequence[str], interval: Interval) -> None:
        """Nothing: what it gives reaches to now."""

    def count(self, resource_type: str, interval: Interval) -> None:
        """Nothing: files do not say how much they hold."""

    def fetch(self, resource_types: Sequence[str], interval: Interval) -> Iterator[Record | RejectedInput]:
        """The resources of the interval. A line that cannot be used counts from when its file was written.

        Raises ConfigurationError if a file is missing or cannot be read.
        """
        self.skipped = Counter()
        wanted = dict.fromkeys(resource_types)
        for file in self._files():
            if file.types and file.types.isdisjoint(wanted):
                continue
            for item in self._read(file, list(wanted)):
                if _moment(item) in interval:
                    yield item

    def _extent(self, resource_types: Sequence[str]) -> Interval | None:
        first = last = None
        for item in self.fetch(resource_types, _ALWAYS):
            moment = _moment(item)
            if first is None or moment < first:
                first = moment
            if last is None or moment > last:
                last = moment
        if first is None or last is None:
            return None
        end = min(last + timedelta(milliseconds=1), self._now())
        return Interval(min(first, end), end)

    def _files(self) -> list[_File]:
        root = Path(self._location).expanduser()
        if root.is_dir():
            paths = [p for p in root.rglob("*") if _SUFFIXES.search(p.name) and not p.name.startswith(".")]
        elif root.is_file():
            paths, root = [root], root.parent
        else:
            paths = [Path(found) for found in glob.glob(str(root), recursive=True)]
            root = Path(os.path.commonpath([p.parent for p in paths])) if paths else root
        files = [_describe(path, root) for path in sorted(paths) if path.is_file()]
        if files:
            return files
        if root.is_dir():
            raise ConfigurationError(f"{self._labels.base_url}: the folder {root} holds no .ndjson or .ndjson.gz file")
        raise ConfigurationError(
            f"{self._labels.base_url}: there is no file, folder or match of a glob at {self._location}"
        )

    def _read(self, file: _File, wanted: list[str]) -> Iterator[Record | RejectedInput]:
        """What a file holds of the wanted types, at any time."""
        reader = _Reader(file, wanted, min(_time(file), self._now()), self.skipped)
        number = 0
        try:
            if file.is_one_resource:
                item = reader.take(self._whole(file), None)
                if item is not None:
                    yield item
                return
            for lines in read_lines(file.path, self._max_line_bytes):
                for line in lines:
                    number += 1
                    item = reader.take(line, number)
                    if item is not None:
                        yield item
        except DamagedFile as error:
            yield reader.rejected("json", number + 1, f"{error}; {number} lines were read", b"")
        except OSError as error:
            raise ConfigurationError(f"{self._labels.base_url}: {file.name} cannot be read: {error.strerror}") from None

    def _whole(self, file: _File) -> bytes | None:
        """A file that holds one resource, over many lines perhaps."""
        whole: list[bytes] = []
        length = 0
        for lines in read_lines(file.path, self._max_line_bytes):
            for line in lines:
                length += len(line or b"") + 1
                if line is None or length > self._max_line_bytes:
                    return None
                whole.append(line)
        return b" ".join(whole)


class _Reader:
    """Turns the lines of one file into what they are."""

    def __init__(self, file: _File, wanted: list[str], arrived: datetime, skipped: Counter[str]) -> None:
        self._file = file
        self._wanted = wanted
        self._arrived = arrived
        self._skipped = skipped
        self._named = next((name for name in wanted if name in file.types), None)

    def take(self, line: bytes | None, number: int | None) -> Record | RejectedInput | None:
        """What a line is; None if it is nobody's. Without a number it is the file."""
        if line is None:
            return self.rejected("json", number, "a line longer than a resource may be", b"")
        body = to_single_line(line)
        if not body:
            return None
        header = None
        try:
            header = read_header(body)
            return build_record(body, header, self._arrived) if self._is_asked_for(header) else None
        except MalformedResource as error:
            name = self._type_of(body)
            return None if name is None else self.rejected(error.rule, number, str(error), body, header, name)

    def rejected(
        self,
        rule: str,
        number: int | None,
        message: str,
        body: bytes,
        header: ResourceHeader | None = None,
        resource_type: str | None = None,
    ) -> RejectedInput:
        """Something that cannot be used."""
        place = self._file.name if number is None else f"{self._file.name}:{number}"
        name = resource_type or self._named or self._wanted[0]
        return RejectedInput(name, header.id if header else None, rule, place, message, self._arrived, body)

    def _is_asked_for(self, header: ResourceHeader) -> bool:
        """Raises Malformed if the file's name promises another type."""
        name = header.resourceType
        if self._file.types and name not in self._file.types and (name in BY_NAME or name not in self._file.path.name):
            raise MalformedResource("a resource of another type than the file's name says", "structure")
        if name in self._wanted:
            return True
        if name not in BY_NAME:
            self._skipped[known_resource_type(name)] += 1
        return False

    def _type_of(self, body: bytes) -> str | None:
        """The type to report a broken line under; None if it belongs to one that is not asked for."""
        if self._named is not None:
            return self._named
        found = _RESOURCE_TYPE.search(body)
        name = found[1].decode() if found else ""
        if name in BY_NAME:
            return name if name in self._wanted else None
        return self._wanted[0]


def _describe(path: Path, root: Path) -> _File:
    stat = path.stat()
    types = frozenset(_TYPE_IN_NAME.findall(path.name))
    return _File(path, path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns, types)


def _moment(item: Record | RejectedInput) -> datetime:
    return item.as_of if isinstance(item, Record) else item.arrived


def _time(file: _File) -> datetime:
    return datetime.fromtimestamp(file.modified_ns / 1e9, UTC)
