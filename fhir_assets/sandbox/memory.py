"""The resources of the sandbox server, in memory: the bytes of every version, by type, ordered by ``lastUpdated``."""

import gzip
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

import msgspec
import orjson

from fhir_assets.errors import ConfigurationError
from fhir_assets.sandbox.dates import TimeRange, parse_date
from fhir_assets.sandbox.parameters import EXTRACTORS

_when = attrgetter("when")
_order = attrgetter("when", "id")


@dataclass(slots=True, eq=False)
class Version:
    """One version of a resource; ``when`` is its ``lastUpdated`` in microseconds. A deletion has no body."""

    resource_type: str
    id: str
    version_id: str
    when: int
    body: bytes
    previous: "Version | None" = None
    current: bool = True

    @property
    def deleted(self) -> bool:
        """Whether this version is a deletion."""
        return not self.body

    def history(self) -> Iterator["Version"]:
        """Yield this version and the earlier ones, newest first."""
        version: Version | None = self
        while version is not None:
            yield version
            version = version.previous


@dataclass(slots=True)
class TypeStore:
    """The resources of one type, with indexes on ``lastUpdated`` and the used search parameters."""

    latest: dict[str, Version] = field(default_factory=dict)
    timeline: list[Version] = field(default_factory=list)
    sorted: bool = True
    stale: int = 0
    indexes: dict[str, dict[str, dict[str, None]]] = field(default_factory=dict)

    def count(self) -> int:
        """Return the number of resources, without deleted ones."""
        return sum(1 for version in self.latest.values() if version.body)

    def add(self, version: Version) -> None:
        """Make ``version`` the latest version of its resource."""
        previous = self.latest.get(version.id)
        if previous is not None:
            previous.current = False
            version.previous = previous
            self.stale += 1
        for name, index in self.indexes.items():
            if previous is not None:
                _unindex(index, name, previous)
            _index(index, name, version)
        self.latest[version.id] = version
        if self.timeline and version.when < self.timeline[-1].when:
            self.sorted = False
        self.timeline.append(version)

    def roll_back(self, version: Version) -> None:
        """Remove ``version``, the latest of its resource, to roll a transaction back."""
        version.current = False
        self.stale += 1
        for name, index in self.indexes.items():
            _unindex(index, name, version)
            if version.previous is not None:
                _index(index, name, version.previous)
        if version.previous is None:
            del self.latest[version.id]
        else:
            version.previous.current = True
            self.latest[version.id] = version.previous

    def find_updated_in(self, time_range: TimeRange) -> list[Version]:
        """Return the resources with a ``lastUpdated`` in the range, ordered by ``lastUpdated``."""
        if not self.sorted or self.stale > len(self.timeline) // 4:
            self.timeline = [version for version in self.timeline if version.current]
            self.timeline.sort(key=_order)
            self.sorted, self.stale = True, 0
        start = bisect_left(self.timeline, time_range.start, key=_when)
        end = bisect_left(self.timeline, time_range.end, key=_when)
        return [version for version in self.timeline[start:end] if version.current and version.body]

    def find_ids(self, name: str, keys: Iterable[str]) -> dict[str, None]:
        """Return the ids of the resources whose search parameter has one of the keys."""
        index = self.indexes.get(name)
        if index is None:
            index = self.indexes[name] = {}
            for version in self.latest.values():
                _index(index, name, version)
        ids: dict[str, None] = {}
        for key in keys:
            ids |= index.get(key, {})
        return ids


def _index(index: dict[str, dict[str, None]], name: str, version: Version) -> None:
    if version.body:
        for key in EXTRACTORS[name](orjson.loads(version.body)):
            index.setdefault(key, {})[version.id] = None


def _unindex(index: dict[str, dict[str, None]], name: str, version: Version) -> None:
    if version.body:
        for key in EXTRACTORS[name](orjson.loads(version.body)):
            index.get(key, {}).pop(version.id, None)


class _Meta(msgspec.Struct, rename="camel"):
    version_id: str | None = None
    last_updated: str | None = None


class _Seed(msgspec.Struct, rename="camel"):
    resource_type: str
    id: str
    meta: _Meta | None = None


_seed = msgspec.json.Decoder(_Seed)


class Store:
    """All resources of a sandbox server, by type. Not thread-safe: only the server's event loop uses it."""

    def __init__(self) -> None:
        self.type_stores: dict[str, TypeStore] = {}

    def type_store(self, resource_type: str) -> TypeStore:
        """Return the resources of a type."""
        type_store = self.type_stores.get(resource_type)
        if type_store is None:
            type_store = self.type_stores[resource_type] = TypeStore()
        return type_store

    def latest(self, resource_type: str, resource_id: str) -> Version | None:
        """Return the latest version of a resource, which may be a deletion."""
        type_store = self.type_stores.get(resource_type)
        return type_store.latest.get(resource_id) if type_store else None

    def seed(self, body: bytes, arrived: int) -> None:
        """Store a resource under its own id, version and time. Its bytes are served unchanged.

        Raises msgspec.DecodeError if it is not a JSON object with a resourceType and an id.
        """
        head = _seed.decode(body)
        meta = head.meta or _Meta()
        when = parse_date(meta.last_updated).start if meta.last_updated else arrived
        type_store = self.type_store(head.resource_type)
        previous = type_store.latest.get(head.id)
        number = meta.version_id or ("1" if previous is None else _next(previous.version_id))
        type_store.add(Version(head.resource_type, head.id, number, when, body))

    def next_version(self, resource_type: str, resource_id: str) -> str:
        """Return the versionId of the next version of a resource."""
        latest = self.latest(resource_type, resource_id)
        return "1" if latest is None else _next(latest.version_id)


def _next(version_id: str) -> str:
    return str(int(version_id) + 1) if version_id.isdecimal() else "2"


def read_lines(folder: Path) -> Iterator[bytes]:
    """Yield the non-blank lines of the .ndjson and .ndjson.gz files of a folder.

    Raises ConfigurationError if the folder does not exist or contains no such file.
    """
    files = sorted(path for path in folder.glob("*") if path.name.endswith((".ndjson", ".ndjson.gz")))
    if not files:
        raise ConfigurationError(
            f"{folder} contains no .ndjson or .ndjson.gz files: pass a folder that contains such files, or --empty"
        )
    for path in files:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for line in lines:
                if text := line.strip():
                    yield text
