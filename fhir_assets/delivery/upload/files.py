"""The input of an upload: NDJSON files, which are counted first and then read again type by type."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fhir_assets.control_characters import escape_control_characters
from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.bundles import BundleEntry
from fhir_assets.fhir.lines import DamagedFile, decompress, split_lines
from fhir_assets.fhir.model import known_resource_type
from fhir_assets.fhir.record import MalformedResource, read_header, to_single_line
from fhir_assets.local_files import FoundFile, find_readable, open_file

MAX_LINE_BYTES = 64 * 2**20

_SUFFIX = re.compile(r"\.(?:ndjson|jsonl)(?:\.gz)?$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Unusable:
    """A line that cannot be sent. ``location`` is ``file:line``; ``message`` contains no content of the line."""

    resource_type: str
    location: str
    message: str
    body: bytes


def is_ndjson(name: str) -> bool:
    """Return whether a file name ends with ``.ndjson`` or ``.jsonl``, optionally followed by ``.gz``."""
    return _SUFFIX.search(name) is not None


class Folder:
    """The NDJSON files of a folder and its subfolders, or one file. Raises ConfigurationError if there is no file."""

    def __init__(self, location: Path) -> None:
        root = location.expanduser()
        files: list[FoundFile] = []
        faulty: list[FoundFile] = []
        if root.is_file():
            root = root.resolve()
            stat = root.stat()
            files = [FoundFile(root.name, stat.st_size, stat.st_mtime_ns)]
            root = root.parent
        elif root.is_dir():
            try:
                files, faulty = find_readable(root, _SUFFIX)
            except OSError as error:
                raise ConfigurationError(f"--input {location}: it cannot be read: {error.strerror}") from None
        if not files and not faulty:
            raise ConfigurationError(f"--input {location}: there is no .ndjson or .ndjson.gz file")
        self._root = root
        self._faults = {file.fault for file in faulty}
        self._files = {
            escape_control_characters(file.name): file
            for file in sorted([*files, *faulty], key=lambda file: file.name.split("/"))
        }

    @property
    def names(self) -> list[str]:
        """The names of the files, in the order in which they are read."""
        return list(self._files)

    def state(self) -> str:
        """Return a digest of the names, sizes and modification times of the files."""
        digest = hashlib.sha256()
        for name, file in self._files.items():
            fault = f"{file.fault}\0" if file.fault in self._faults else ""
            digest.update(f"{name}\0{file.size}\0{file.modified_ns}\0{fault}".encode())
        return digest.hexdigest()[:32]

    def count(self, name: str, refuse: Callable[[Unusable], None]) -> dict[str, int]:
        """Count the resources of a file by type, as stated in its lines. Unusable lines are passed to ``refuse``."""
        counts: dict[str, int] = {}
        for item in self._items(name):
            if isinstance(item, BundleEntry):
                counts[item.resource_type] = counts.get(item.resource_type, 0) + 1
            else:
                refuse(item)
        return counts

    def entries(self, name: str, resource_type: str) -> Iterator[BundleEntry]:
        """Yield the resources of one type of a file."""
        for item in self._items(name):
            if isinstance(item, BundleEntry) and item.resource_type == resource_type:
                yield item

    def _items(self, name: str) -> Iterator[BundleEntry | Unusable]:
        number = 0
        file = self._files[name]
        if file.fault in self._faults:
            yield Unusable("", name, f"the file is not read: {file.fault}", b"")
            return
        try:
            for lines in split_lines(self._read(file), MAX_LINE_BYTES):
                for line in lines:
                    number += 1
                    if line is None:
                        yield Unusable("", f"{name}:{number}", "the line is longer than the limit of 64 MiB", b"")
                    elif body := to_single_line(line):
                        yield read_entry(body, f"{name}:{number}")
        except DamagedFile as error:
            yield Unusable("", f"{name}:{number + 1}", f"{error}; {number} lines were read", b"")
        except OSError as error:
            raise ConfigurationError(f"--input: {name} cannot be read: {error.strerror or error}") from None

    def _read(self, file: FoundFile) -> Iterator[bytes]:
        with open_file(self._root, file.name, OSError) as stream:
            yield from decompress(stream)


def read_entry(body: bytes, location: str) -> BundleEntry | Unusable:
    """Return the Bundle entry of a line, or the reason why there is none."""
    try:
        header = read_header(body)
    except MalformedResource as error:
        return Unusable("", location, str(error), body)
    if known_resource_type(header.resource_type) != header.resource_type:
        return Unusable("", location, "its resourceType is not defined by FHIR R4", body)
    if not header.id:
        return Unusable(header.resource_type, location, "it has no id, which an update (PUT) needs", body)
    return BundleEntry(header.resource_type, header.id, body, location)


def rename_location(location: str, name_file: Callable[[str], str]) -> str:
    """Return a location, ``file:line`` or ``file``, with another name of the file."""
    name, separator, line = location.rpartition(":")
    return f"{name_file(name)}:{line}" if separator and line.isdecimal() else name_file(location)


Counts = Mapping[str, Mapping[str, int]]
"""The number of resources by file and resource type."""
