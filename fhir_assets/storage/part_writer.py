"""Writes parts of many partitions concurrently, in bounded memory."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType

from isal import igzip

from fhir_assets.foreign_errors import choose_store_error
from fhir_assets.storage.encrypted_parts import MARK, SUFFIX, FrameEncryptor
from fhir_assets.storage.manifest import Arrival, Part
from fhir_assets.storage.store import LAYERS, Store, map_concurrently, partition_folder

BUFFER_BYTES = 16 << 20
"""The total size of the buffered lines of all open parts at which they are written to the disk."""

PART_BYTES = 128 << 20
"""The compressed size at which a part is finished and the next part begins."""


_PartKey = tuple[str, str, bool, bool]
"""The resource type, the partition key, and whether the dates of the lines count and their arrivals are known."""


@dataclass(slots=True)
class _OpenPart:
    path: Path
    name: str
    encryptor: FrameEncryptor | None
    """None in a store that is not encrypted."""
    dated: bool
    lines: list[bytes] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0
    stored_bytes: int = 0
    first: datetime | None = None
    last: datetime | None = None
    arrived: datetime | None = None
    arrival_starts: list[tuple[int, datetime]] = field(default_factory=list)

    def begin_arrival(self, at: datetime) -> None:
        """Record that the lines from here on arrived at ``at``."""
        self.arrived = at
        self.arrival_starts.append((self.rows + len(self.lines), at))

    def list_arrivals(self) -> tuple[Arrival, ...]:
        """Return the arrivals of all lines. The lines must be flushed."""
        ends = [start for start, _ in self.arrival_starts[1:]] + [self.rows]
        return tuple(Arrival(end - start, at) for (start, at), end in zip(self.arrival_starts, ends, strict=False))

    def flush(self) -> None:
        """Append the buffered lines as one gzip member; a sequence of members is a gzip file (RFC 1952, section 2.2).

        With encryption keys no clear text is written to the disk.
        """
        if not self.lines:
            return
        content = b"\n".join(self.lines) + b"\n"
        packed = igzip.compress(content, 1)
        with self.path.open("ab") as file:
            if self.encryptor is None:
                file.write(packed)
            else:
                if not self.rows:
                    file.write(MARK)
                file.writelines(self.encryptor.encrypt(packed))
            self.stored_bytes = file.tell()
        self.rows += len(self.lines)
        self.bytes += len(content)
        self.lines = []


class PartWriter:
    """Writes lines to the parts of any partitions of one layer, in any order.

    ``finish`` stores the parts and returns them. They belong to no partition until a manifest names them, so that a
    ``with`` block that ends without ``finish``, or a killed process, changes no partition.
    """

    def __init__(self, store: Store, layer: str, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        if layer not in LAYERS:
            raise ValueError(f"layer {layer} is not in store.LAYERS: a key rotation would not re-encrypt its parts")
        self._store = store
        self._layer = layer
        self._buffer_bytes = buffer_bytes
        self._buffered = 0
        self._open: dict[_PartKey, _OpenPart] = {}
        self._done: dict[tuple[str, str], list[Part]] = {}
        self._spool = store.blobs.spool()
        self._generation = os.urandom(6).hex()
        self._number = 0

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in self._open.values():
            part.path.unlink(missing_ok=True)

    def add(
        self,
        resource_type: str,
        partition_key: str,
        line: bytes,
        moment: datetime | None,
        *,
        arrived: datetime | None = None,
        dated: bool = True,
    ) -> None:
        """Write one line, without its line feed. Raises StoreError.

        ``moment`` is its lastUpdated, ``arrived`` the time of its arrival, if known. Lines whose lastUpdated does not
        count (``dated`` is False) get parts of their own.
        """
        key = (resource_type, partition_key, dated, arrived is not None)
        part = self._open.get(key) or self._begin(key)
        if arrived is not None and arrived != part.arrived:
            part.begin_arrival(arrived)
        part.lines.append(line)
        if moment is not None:
            if part.first is None or moment < part.first:
                part.first = moment
            if part.last is None or moment > part.last:
                part.last = moment
        self._buffered += len(line) + 1
        if self._buffered >= self._buffer_bytes:
            self._flush()

    def finish(self) -> dict[tuple[str, str], tuple[Part, ...]]:
        """Store every part; return the parts by (resource type, partition key). Raises StoreError."""
        self._flush()
        for (resource_type, partition_key, *_), part in map_concurrently(self._put, self._open):
            self._done.setdefault((resource_type, partition_key), []).append(part)
        self._open.clear()
        return {key: tuple(parts) for key, parts in self._done.items()}

    def _begin(self, key: _PartKey) -> _OpenPart:
        self._number += 1
        cipher = self._store.cipher
        file = f"part-{self._generation}-{self._number:05}.ndjson.gz{SUFFIX if cipher.encrypts else ''}"
        name = f"{partition_folder(self._layer, *key[:2])}/{file}"
        encryptor = FrameEncryptor(cipher, self._store.place(name)) if cipher.encrypts else None
        part = _OpenPart(self._spool / file, name, encryptor, key[2])
        self._open[key] = part
        return part

    def _flush(self) -> None:
        try:
            for part in self._open.values():
                part.flush()
        except OSError as error:
            raise choose_store_error(error)(
                f"cannot write to {self._spool}: {error.strerror or type(error).__name__}. Free space there, "
                "then run the partition again: it was not changed"
            ) from None
        self._buffered = 0
        for key in [key for key, part in self._open.items() if part.stored_bytes >= PART_BYTES]:
            self._done.setdefault(key[:2], []).append(self._put(key)[1])
            del self._open[key]

    def _put(self, key: _PartKey) -> tuple[_PartKey, Part]:
        part = self._open[key]
        self._store.blobs.put_file(part.name, part.path)
        return key, Part(
            part.name,
            part.rows,
            part.bytes,
            part.stored_bytes,
            part.first,
            part.last,
            arrivals=part.list_arrivals(),
            dated=part.dated,
        )


def flatten_batches(batches: Iterator[list[bytes]]) -> Iterator[bytes]:
    """Yield the lines of batches one by one."""
    for batch in batches:
        yield from batch
