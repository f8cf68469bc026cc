"""A place where files are put: a folder, or a bucket. What is in it is never moved or deleted."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Protocol

from fhir_assets.errors import ConfigurationError, StoreError
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.storage.encrypted_parts import MARK, frames, opened
from fhir_assets.storage.s3 import Bucket

DONE = ".done"
"""What a file's name bears in addition where the empty file beside it says that it is complete."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file of a zone: ``mark`` changes when its content does."""

    name: str
    size: int
    mark: str
    written: datetime


class Zone(Protocol):
    """Where files land. ``whole``: a file that is listed is complete, however it came."""

    url: str
    whole: bool

    def files(self) -> Iterator[FoundFile]:
        """Every file, hidden ones left out. Raises ConfigurationError if there is no such zone."""
        ...

    def open(self, name: str) -> BinaryIO:
        """A file as a stream. Raises StoreError."""
        ...

    def put(self, name: str, content: bytes) -> None:
        """Put a file down, which appears whole and counts as complete at once. Raises StoreError."""
        ...


class FolderZone:
    """A folder and all below it."""

    whole = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def files(self) -> Iterator[FoundFile]:
        if not self.root.is_dir():
            raise ConfigurationError(f"FHIR_LANDING_URL: there is no folder {self.root}: create it, or correct this")
        for folder, below, names in os.walk(self.root):
            below[:] = [name for name in below if not name.startswith(".")]
            for name in names:
                path = Path(folder) / name
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue  # gone since it was listed
                if not name.startswith(".") and path.is_file():
                    written = datetime.fromtimestamp(stat.st_mtime, UTC)
                    relative = path.relative_to(self.root).as_posix()
                    yield FoundFile(relative, stat.st_size, str(stat.st_mtime_ns), written)

    def open(self, name: str) -> BinaryIO:
        try:
            return (self.root / name).open("rb")
        except OSError as error:
            raise StoreError(f"a landed file cannot be read: {error.strerror or type(error).__name__}") from None

    def put(self, name: str, content: bytes) -> None:
        path = self.root / name
        hidden = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with hidden.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            path.with_name(path.name + DONE).touch()
            hidden.replace(path)
        except OSError as error:
            raise StoreError(f"the landing zone cannot take a file: {error.strerror or type(error).__name__}") from None


class BucketZone:
    """A bucket below a prefix. An object appears in it whole."""

    whole = True

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.url = bucket.url

    def files(self) -> Iterator[FoundFile]:
        for found in self.bucket.listing():
            name = found["Name"]
            if name.endswith("/") or any(part.startswith(".") for part in name.split("/")):
                continue
            # S3 tells whole seconds: what was put before the object in its second stays before it.
            written = found["LastModified"].astimezone(UTC).replace(microsecond=999_999)
            yield FoundFile(name, found["Size"], found["ETag"].strip('"'), written)

    def open(self, name: str) -> BinaryIO:
        return self.bucket.open(name)

    def put(self, name: str, content: bytes) -> None:
        self.bucket.put(name, content)


class EncryptedZone:
    """A zone in which what is put from here is sealed. What others put there they put in the clear; both are read."""

    def __init__(self, zone: Zone, cipher: Cipher) -> None:
        self._zone = zone
        self._cipher = cipher
        self.url = zone.url
        self.whole = zone.whole

    def files(self) -> Iterator[FoundFile]:
        return self._zone.files()

    def open(self, name: str) -> BinaryIO:
        return opened(self._zone.open(name), self._cipher)

    def put(self, name: str, content: bytes) -> None:
        sealed = b"".join([MARK, *frames(content, self._cipher)]) if self._cipher.on else content
        self._zone.put(name, sealed)


def open_zone(url: str, *, bucket: Callable[[str], Bucket]) -> Zone:
    """The zone at a folder or ``s3://bucket/prefix``. Raises ConfigurationError for another scheme."""
    if url.startswith("s3://"):
        return BucketZone(bucket(url))
    if "://" in url and not url.startswith("file://"):
        raise ConfigurationError(
            f"FHIR_LANDING_URL: {url.split('://')[0]}:// is not served; give a folder or s3://bucket/prefix"
        )
    return FolderZone(Path(url.removeprefix("file://")).expanduser().absolute())
