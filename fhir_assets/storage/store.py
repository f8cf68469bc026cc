"""The store: partitions of NDJSON, each in a folder ``<layer>/<type>/<partition key>``.

A folder contains ``manifest.json`` and the parts that the manifest names.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar, cast

import msgspec
from isal import igzip, isal_zlib

from fhir_assets.catalog import snake_case
from fhir_assets.errors import ConfigurationError, EncryptionError, FileMissing, StoreError
from fhir_assets.file_modes import PRIVATE
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.privacy.places import Place, file_place
from fhir_assets.sources import DEFAULT_SOURCE, require_source_key
from fhir_assets.storage.blobs import Blobs, LocalBlobs
from fhir_assets.storage.encrypted_parts import decrypt_stream
from fhir_assets.storage.manifest import Arrival, Manifest, Part, list_times
from fhir_assets.storage.s3 import Bucket, S3Blobs

Item = TypeVar("Item")
Result = TypeVar("Result")

LAYERS = ("raw", "validated", "bulk", "deleted")
"""The layers that have parts. A key rotation re-encrypts the parts of all of them."""

SOURCES_FOLDER = "sources"
"""The folder that contains a folder for each source except the default one."""

BATCH_BYTES = 1 << 20
"""The size of one read. A batch of lines is the unit of work of validation and loading."""

CONCURRENT_CALLS = 8
"""The number of manifests that are read or written concurrently, each of which waits for the bucket or the disk."""

_REMEDY = {
    "raw": "restore it from a backup. Without a backup move this file away, keep the parts in the same folder, "
    "materialize the partition with a full refresh, and send again the files and requests that ops.received lists for "
    "the partition",
    "deleted": "restore it from a backup. Without a backup move this file away: the tables contain these deletions, "
    "but tables that are rebuilt will not",
}
_DEFAULT_REMEDY = "move this file away and materialize the partition again: it is made from the raw partition"
"""The advice for a damaged manifest, by layer. The parts in its folder may exist nowhere else."""

_unpack = cast(Callable[..., BinaryIO], igzip.IGzipFile)
_DAMAGED = cast(type[Exception], isal_zlib.error)
_decoder = msgspec.json.Decoder(Manifest)


def map_concurrently(
    function: Callable[[Item], Result], items: Iterable[Item], *, calls: int = CONCURRENT_CALLS
) -> list[Result]:
    """Return the results of ``function`` for all items, in their order, with up to ``calls`` concurrent threads."""
    inputs = list(items)
    if min(len(inputs), calls) < 2:
        return [function(item) for item in inputs]
    with ThreadPoolExecutor(min(len(inputs), calls)) as pool:
        return list(pool.map(function, inputs))


def partition_folder(layer: str, resource_type: str, partition_key: str) -> str:
    """Return the folder of a partition, relative to the store."""
    return f"{layer}/{snake_case(resource_type)}/{partition_key}"


class LineBatch(NamedTuple):
    """Lines of one part, with their arrivals and the ``dated`` of the part."""

    lines: list[bytes]
    arrivals: tuple[Arrival, ...]
    dated: bool

    def times(self) -> Iterator[datetime | None]:
        """Yield the time of arrival of each line. If the part does not record them, yield None endlessly."""
        return list_times(self.arrivals)


class CountedLines(NamedTuple):
    """The complete lines of a part that the store has, and what is wrong with the part; empty if nothing is."""

    rows: int
    defect: str = ""


class Store:
    """Reads and commits the partitions of one source; ``PartWriter`` writes their parts.

    ``cipher`` encrypts and decrypts the parts.
    """

    def __init__(self, blobs: Blobs, cipher: Cipher, *, source: str = DEFAULT_SOURCE) -> None:
        self.blobs = blobs
        self.cipher = cipher
        self.source = source

    def place(self, name: str) -> Place:
        """Return the place of the file ``name``, to which its encrypted content is bound."""
        return file_place("store", self.source, name)

    def manifest(self, layer: str, resource_type: str, partition_key: str) -> Manifest | None:
        """Return the manifest of a partition, or None if it does not exist. Raises StoreError if it is damaged."""
        return self.read_manifest(f"{partition_folder(layer, resource_type, partition_key)}/manifest.json", layer)

    def read_manifest(self, name: str, layer: str) -> Manifest | None:
        """Return the manifest in the file ``name`` of a layer, or None if there is none. Raises StoreError."""
        content = self.blobs.get(name)
        if content is None:
            return None
        try:
            return _decoder.decode(content)
        except msgspec.DecodeError:
            raise StoreError(f"{self.blobs.url}/{name} is damaged: {_REMEDY.get(layer, _DEFAULT_REMEDY)}") from None

    def manifests(self, layer: str, resource_type: str, partition_keys: Iterable[str]) -> list[Manifest]:
        """Return the manifests of the partitions that have one, in the order of the keys. Raises StoreError."""
        manifests = self._manifests((layer, resource_type, key) for key in partition_keys)
        return [manifest for manifest in manifests if manifest is not None]

    def committed_manifests(self, manifests: Iterable[Manifest]) -> list[Manifest | None]:
        """Return the committed manifests of the same partitions, in the same order; None for a new partition."""
        return self._manifests(
            (manifest.layer, manifest.resource_type, manifest.partition_key) for manifest in manifests
        )

    def _manifests(self, partitions: Iterable[tuple[str, str, str]]) -> list[Manifest | None]:
        # Reading a small local file takes less time than starting a thread.
        calls = 1 if isinstance(self.blobs, LocalBlobs) else CONCURRENT_CALLS
        return map_concurrently(lambda partition: self.manifest(*partition), partitions, calls=calls)

    def commit(self, manifests: Iterable[Manifest]) -> None:
        """Write the manifests, each atomically. Their parts must be stored already. Raises StoreError."""
        map_concurrently(self._commit_one, manifests)

    def _commit_one(self, manifest: Manifest) -> None:
        partition = partition_folder(manifest.layer, manifest.resource_type, manifest.partition_key)
        if manifest.source != self.source:
            manifest = msgspec.structs.replace(manifest, source=self.source)
        content = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        self.blobs.put(f"{partition}/manifest.json", content)

    def partition_keys(self, layer: str, resource_type: str) -> list[str]:
        """Return the sorted keys of all partitions of a type. Lists the files of the store."""
        names = self.blobs.names(f"{layer}/{snake_case(resource_type)}")
        return sorted(name.split("/")[-2] for name in names if name.endswith("/manifest.json"))

    def batches(self, parts: Iterable[Part]) -> Iterator[list[bytes]]:
        """Yield the lines of the parts without line feeds, in batches of about 1 MiB.

        Raises StoreError if a part is missing or damaged, or if its number of lines differs from its manifest.
        """
        for part in parts:
            rows = 0
            for batch in self._lines(part):
                rows += len(batch)
                yield batch
            if rows != part.rows:
                raise self._damaged(part)

    def batches_with_arrivals(self, parts: Iterable[Part]) -> Iterator[LineBatch]:
        """Yield the lines of the parts with their arrivals, in the same batches as ``batches``. Raises StoreError."""
        for part in parts:
            start = 0
            for lines in self.batches([part]):
                yield LineBatch(lines, _slice_arrivals(part.arrivals, start, start + len(lines)), part.dated)
                start += len(lines)

    def count_lines(self, part: Part) -> CountedLines:
        """Read a part and count its lines, whatever its manifest says. Raises StoreError if the store cannot be read.

        Of a part that breaks off, the lines before the break are counted.
        """
        rows = 0
        last = b"\n"
        try:
            with self._open(part) as file:
                while chunk := file.read(BATCH_BYTES):
                    rows += chunk.count(b"\n")
                    last = chunk[-1:]
        except FileMissing:
            return CountedLines(0, f"{part.name} is missing")
        except (OSError, EOFError, _DAMAGED):
            return CountedLines(rows, f"{part.name} is damaged")
        except EncryptionError as error:
            return CountedLines(rows, f"{part.name}: {error}")
        if last != b"\n":
            return CountedLines(rows, f"{part.name} breaks off")
        if rows != part.rows:
            return CountedLines(rows, f"{part.name} has {rows} lines, {part.rows} were written")
        return CountedLines(rows)

    def _lines(self, part: Part) -> Iterator[list[bytes]]:
        rest: list[bytes] = []
        left = part.bytes
        with self._open(part) as file:
            while True:
                try:
                    chunk = file.read(BATCH_BYTES)
                except (OSError, EOFError, _DAMAGED):
                    raise self._damaged(part) from None
                except EncryptionError as error:
                    raise EncryptionError(f"{part.name}: {error}") from None
                if not chunk:
                    break
                left -= len(chunk)
                if left < 0:
                    raise self._damaged(part)
                head, *lines = chunk.split(b"\n")
                rest.append(head)
                if lines:
                    lines.insert(0, b"".join(rest))
                    rest = [lines.pop()]
                    yield lines
        if any(rest):
            raise self._damaged(part)

    @contextmanager
    def _open(self, part: Part) -> Iterator[BinaryIO]:
        """Open a part for reading, decrypted and unpacked."""
        with self.blobs.open(part.name) as raw:
            content = decrypt_stream(raw, self.cipher, self.place(part.name), clear=not self.cipher.encrypts)
            with _unpack(fileobj=content, mode="rb") as file:
                yield file

    def _damaged(self, part: Part) -> StoreError:
        return StoreError(
            f"{self.blobs.url}/{part.name} is damaged or incomplete: materialize its raw partition again "
            "with a full refresh"
        )


def _slice_arrivals(arrivals: tuple[Arrival, ...], start: int, end: int) -> tuple[Arrival, ...]:
    """Return the arrivals of the lines from ``start`` to ``end`` (exclusive)."""
    if len(arrivals) == 1:
        return (Arrival(end - start, arrivals[0].at),)
    sliced = []
    first = 0
    for arrival in arrivals:
        rows = min(first + arrival.rows, end) - max(first, start)
        if rows > 0:
            sliced.append(Arrival(rows, arrival.at))
        first += arrival.rows
    return tuple(sliced)


OpenBucket = Callable[[str], Bucket]
"""Return the bucket at ``s3://bucket/prefix``."""


def open_store(url: str, cipher: Cipher, *, bucket: OpenBucket | None = None, source: str = DEFAULT_SOURCE) -> Store:
    """Return the store at ``url``, whose parts ``cipher`` encrypts and decrypts. Raises as ``open_blobs`` does.

    The partitions of the default source are at ``url`` itself, those of another source in the folder
    ``sources/<source>`` below.
    """
    if source != DEFAULT_SOURCE:
        url = f"{url.rstrip('/')}/{SOURCES_FOLDER}/{require_source_key(source)}"
    return Store(open_blobs(url, bucket=bucket), cipher, source=source)


def open_blobs(url: str, *, bucket: OpenBucket | None = None, mode: int = PRIVATE) -> Blobs:
    """Return the files at ``url``: a folder, or ``s3://bucket/prefix``, which ``bucket`` opens.

    ``mode`` is the permissions of the files in a folder.

    Raises ConfigurationError for another scheme.
    """
    if url.startswith("s3://") and bucket is not None:
        return S3Blobs(bucket(url))
    if "://" in url and not url.startswith("file://"):
        raise ConfigurationError(
            f"FHIR_STORE_URL: {url.split('://')[0]}:// is not supported; set a folder or s3://bucket/prefix"
        )
    return LocalBlobs(Path(url.removeprefix("file://")).expanduser().absolute(), mode=mode)
