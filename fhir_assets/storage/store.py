"""Partitions of NDJSON: ``<layer>/<type>/<partition key>/manifest.json`` and the parts it names."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import msgspec
from isal import igzip, isal_zlib

from fhir_assets.catalog import snake_case
from fhir_assets.errors import ConfigurationError, StoreError
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.storage.blobs import Blobs, LocalBlobs
from fhir_assets.storage.encrypted_parts import opened
from fhir_assets.storage.manifest import Manifest, Part
from fhir_assets.storage.s3 import Bucket, S3Blobs

Given = TypeVar("Given")
Made = TypeVar("Made")

LAYERS = ("raw", "validated", "bulk", "deleted")
"""What parts are written to: a rotation of the keys goes through all of them."""

BATCH_BYTES = 1 << 20
"""How much is read at once: a batch of lines is the unit of work of validation and loading."""

_CALLS_AT_ONCE = 8
"""How many manifests are read or written at once: a bucket, or a disk that is to be sure, takes its time for each."""

_MEND = {
    "raw": "put it back from a backup. Without one move this one file away, keep the parts beside it, materialize the "
    "partition with a full refresh, and land or send again what came for it by other doors: ops.received lists the "
    "origins",
    "deleted": "put it back from a backup. Without one move this one file away: the tables know these deletions, but "
    "tables that are built anew will not",
}
_MEND_ANY = "move this one file away and materialize the partition again: it is made of the raw one"
"""What to do about a damaged manifest, by layer. The folder itself holds what may be nowhere else."""

_unpack = cast(Callable[..., BinaryIO], igzip.IGzipFile)
_DAMAGED = cast(type[Exception], isal_zlib.error)
_decoder = msgspec.json.Decoder(Manifest)


def at_once(do: Callable[[Given], Made], items: Iterable[Given], *, calls: int = _CALLS_AT_ONCE) -> list[Made]:
    """What ``do`` makes of each item, in their order, with several calls under way; a single one needs no thread."""
    some = list(items)
    if min(len(some), calls) < 2:
        return [do(item) for item in some]
    with ThreadPoolExecutor(min(len(some), calls)) as pool:
        return list(pool.map(do, some))


def folder(layer: str, resource_type: str, partition_key: str) -> str:
    """The folder of a partition, relative to the store."""
    return f"{layer}/{snake_case(resource_type)}/{partition_key}"


class Store:
    """Reads and commits partitions. Writing their parts is PartWriter's. ``sealing`` opens and seals the parts."""

    def __init__(self, blobs: Blobs, cipher: Cipher) -> None:
        self.blobs = blobs
        self.cipher = cipher

    def manifest(self, layer: str, resource_type: str, partition_key: str) -> Manifest | None:
        """The committed state of a partition, None if it was never written. Raises StoreError."""
        name = f"{folder(layer, resource_type, partition_key)}/manifest.json"
        content = self.blobs.get(name)
        if content is None:
            return None
        try:
            return _decoder.decode(content)
        except msgspec.DecodeError:
            raise StoreError(f"{self.blobs.url}/{name} is damaged: {_MEND.get(layer, _MEND_ANY)}") from None

    def manifests(self, layer: str, resource_type: str, partition_keys: Iterable[str]) -> list[Manifest]:
        """The manifests of those partitions that have one, in the order of the keys."""
        found = self._manifests((layer, resource_type, key) for key in partition_keys)
        return [manifest for manifest in found if manifest is not None]

    def present(self, manifests: Iterable[Manifest]) -> list[Manifest | None]:
        """What is committed of the partitions of these manifests, each in its place."""
        return self._manifests((each.layer, each.resource_type, each.partition_key) for each in manifests)

    def _manifests(self, partitions: Iterable[tuple[str, str, str]]) -> list[Manifest | None]:
        # A small file of this machine is read before a thread has begun.
        calls = 1 if isinstance(self.blobs, LocalBlobs) else _CALLS_AT_ONCE
        return at_once(lambda partition: self.manifest(*partition), partitions, calls=calls)

    def commit(self, manifests: Iterable[Manifest]) -> None:
        """Make the partitions visible, each in one step. Their parts must have been put before."""
        at_once(self._commit_one, manifests)

    def _commit_one(self, manifest: Manifest) -> None:
        where = folder(manifest.layer, manifest.resource_type, manifest.partition_key)
        content = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        self.blobs.put(f"{where}/manifest.json", content)

    def partition_keys(self, layer: str, resource_type: str) -> list[str]:
        """The keys of every partition of a type that was ever written, in order. Lists the store."""
        names = self.blobs.names(f"{layer}/{snake_case(resource_type)}")
        return sorted(name.split("/")[-2] for name in names if name.endswith("/manifest.json"))

    def batches(self, parts: Iterable[Part]) -> Iterator[list[bytes]]:
        """The lines of the parts, without line feeds, about 1 MiB at a time.

        Raises StoreError if a part is missing, damaged, or has not as many lines as its manifest says.
        """
        for part in parts:
            rows = 0
            for batch in self._lines(part):
                rows += len(batch)
                yield batch
            if rows != part.rows:
                raise self._damaged(part)

    def _lines(self, part: Part) -> Iterator[list[bytes]]:
        rest = b""
        with self.blobs.open(part.name) as raw, _unpack(fileobj=opened(raw, self.cipher), mode="rb") as file:
            while True:
                try:
                    chunk = file.read(BATCH_BYTES)
                except (OSError, EOFError, _DAMAGED):
                    raise self._damaged(part) from None
                if not chunk:
                    break
                lines = (rest + chunk).split(b"\n")
                rest = lines.pop()
                if lines:
                    yield lines
        if rest:
            raise self._damaged(part)

    def _damaged(self, part: Part) -> StoreError:
        return StoreError(
            f"{self.blobs.url}/{part.name} is damaged or incomplete: materialize its raw partition again "
            "with a full refresh"
        )


OpenBucket = Callable[[str], Bucket]
"""Return the bucket at ``s3://bucket/prefix``."""


def open_store(url: str, cipher: Cipher, *, bucket: OpenBucket | None = None) -> Store:
    """Return the store at ``url``, whose parts ``cipher`` encrypts and decrypts. Raises as ``open_blobs`` does."""
    return Store(open_blobs(url, bucket=bucket), cipher)


def open_blobs(url: str, *, bucket: OpenBucket | None = None) -> Blobs:
    """Return the files at ``url``: a folder, or ``s3://bucket/prefix``, which ``bucket`` opens.

    Raises ConfigurationError for another scheme.
    """
    if url.startswith("s3://") and bucket is not None:
        return S3Blobs(bucket(url))
    if "://" in url and not url.startswith("file://"):
        raise ConfigurationError(
            f"FHIR_STORE_URL: {url.split('://')[0]}:// is not supported; set a folder or s3://bucket/prefix"
        )
    return LocalBlobs(Path(url.removeprefix("file://")).expanduser().absolute())
