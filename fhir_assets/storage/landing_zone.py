"""The landing zone: a folder or a bucket that others put files into. Files in it are never moved or deleted."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Protocol

from fhir_assets.atomic_files import replace_file
from fhir_assets.control_characters import escape_control_characters
from fhir_assets.errors import ConfigurationError, StoreError
from fhir_assets.file_modes import PRIVATE, create_folders
from fhir_assets.foreign_errors import choose_store_error
from fhir_assets.local_files import (
    LONG_NAME,
    MAX_NAME_BYTES,
    FoundFile,
    open_file,
    walk_files,
)
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.privacy.places import file_place
from fhir_assets.storage.encrypted_parts import MARK, FrameEncryptor, decrypt_stream
from fhir_assets.storage.s3 import Bucket, ListedObject

DONE = ".done"
"""The suffix of a marker file: the empty file ``<name>.done`` states that the file ``<name>`` is complete."""

_ODD_KEY = "its key has a part . or .., which clients of S3 resolve differently: rename it"

_READ_BYTES = 1 << 18

ENCRYPTED = ".encrypted"
"""The suffix of files that this project has encrypted, so that nobody takes them for the format of their name."""


@dataclass(frozen=True, slots=True)
class LandingFile:
    """A file of a zone. ``mark`` changes when the content changes: a time of modification or an ETag.

    ``fault`` is the reason why it can never be read, such as a link; its name is then one that can be shown and stored.
    """

    name: str
    size: int
    mark: str
    written: datetime
    fault: str | None = None


class Zone(Protocol):
    """A landing zone. ``atomic`` is whether all listed files are complete.

    ``suffix`` is to be added to the names of files that are put there.
    """

    url: str
    atomic: bool
    suffix: str

    def files(self) -> Iterator[LandingFile]:
        """Yield all files except hidden ones. Raises ConfigurationError if the zone does not exist."""
        ...

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading. Raises StoreError."""
        ...

    def put(self, name: str, content: bytes) -> LandingFile:
        """Write a file, which appears complete, and return it as it is listed. Raises StoreError."""
        ...


class FolderZone:
    """A folder and its subfolders."""

    atomic = False
    suffix = ""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def files(self) -> Iterator[LandingFile]:
        """Yield all files except hidden ones. Raises ConfigurationError if the zone does not exist."""
        if not self.root.is_dir():
            raise ConfigurationError(
                f"FHIR_LANDING_URL: the folder {self.root} does not exist: create it, or correct the setting"
            )
        try:
            for found in walk_files(self.root):
                yield self._describe(found)
        except OSError as error:
            raise ConfigurationError(
                f"FHIR_LANDING_URL: the folder {self.root} cannot be read: {error.strerror}: correct its permissions"
            ) from None

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading. Raises StoreError."""
        return open_file(self.root, name, _unreadable)

    def put(self, name: str, content: bytes) -> LandingFile:
        """Write a file, which appears complete, and return it as it is listed. Raises StoreError."""
        path = self.root / name
        try:
            create_folders(path.parent)
            with replace_file(path) as file:
                file.write(content)
                path.with_name(path.name + DONE).touch(PRIVATE)
            stat = path.stat()
            return self._describe(FoundFile(name, stat.st_size, stat.st_mtime_ns))
        except OSError as error:
            raise choose_store_error(error)(
                f"a file cannot be written to the landing zone: {error.strerror or type(error).__name__}"
            ) from None

    def _describe(self, found: FoundFile) -> LandingFile:
        written = datetime.fromtimestamp(found.modified_ns / 1e9, UTC)
        if found.fault:
            return _describe_fault(found.name, found.fault, written)
        return LandingFile(found.name, found.size, str(found.modified_ns), written)


def _unreadable(reason: str) -> StoreError:
    return StoreError(f"a file of the landing zone cannot be read: {reason}")


class BucketZone:
    """The objects of a bucket below a prefix. An object appears complete."""

    atomic = True
    suffix = ""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.url = bucket.url

    def files(self) -> Iterator[LandingFile]:
        """Yield all files except hidden ones. Raises ConfigurationError if the zone does not exist."""
        for entry in self.bucket.listing():
            name = entry.name
            fault = _find_fault_of_key(name)
            if not name or name.endswith("/") or (not fault and any(part.startswith(".") for part in name.split("/"))):
                continue
            if fault:
                yield _describe_fault(name, fault, entry.modified)
            else:
                yield _describe_object(entry)

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading. Raises StoreError."""
        return self.bucket.open(name, called="a file of the landing zone")

    def put(self, name: str, content: bytes) -> LandingFile:
        """Write a file, which appears complete, and return it as it is listed. Raises StoreError."""
        self.bucket.put(name, content)
        for entry in self.bucket.listing(name):
            if entry.name == name:
                return _describe_object(entry)
        raise StoreError(f"{self.url} does not list a file that was written to it: try again")


class EncryptedZone:
    """A zone that encrypts the files that this project writes. It reads encrypted files and clear text of others."""

    def __init__(self, zone: Zone, cipher: Cipher) -> None:
        self._zone = zone
        self._cipher = cipher
        self.url = zone.url
        self.atomic = zone.atomic
        self.suffix = ENCRYPTED if cipher.encrypts else ""

    def files(self) -> Iterator[LandingFile]:
        """Yield all files except hidden ones. Raises ConfigurationError if the zone does not exist."""
        return self._zone.files()

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading. Raises StoreError."""
        return decrypt_stream(self._zone.open(name), self._cipher, file_place("landing zone", "", name))

    def put(self, name: str, content: bytes) -> LandingFile:
        """Write a file, which appears complete, and return it as it is listed. Raises StoreError."""
        if not self._cipher.encrypts:
            return self._zone.put(name, content)
        encryptor = FrameEncryptor(self._cipher, file_place("landing zone", "", name))
        return self._zone.put(name, b"".join([MARK, *encryptor.encrypt(content)]))


def _describe_fault(name: str, fault: str, written: datetime) -> LandingFile:
    """Return a file that can never be read, under a name that can be stored."""
    shown = escape_control_characters(name)
    if len(shown.encode()) > MAX_NAME_BYTES:
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()
        shown = f"{shown[:100]}…{digest[:12]}…{shown[-100:]}"
    return LandingFile(shown, 0, fault, written, fault)


def _find_fault_of_key(name: str) -> str | None:
    """Return why an object of a bucket is not read, None if it is."""
    if any(part in (".", "..") for part in name.split("/")) or "\0" in name:
        return _ODD_KEY
    return LONG_NAME if len(name.encode(errors="replace")) > MAX_NAME_BYTES else None


def _describe_object(entry: ListedObject) -> LandingFile:
    """Return an object of a bucket.

    S3 reports whole seconds. The last microsecond of the second sorts the object after files of other zones that were
    written in the same second.
    """
    return LandingFile(entry.name, entry.bytes, entry.etag, entry.modified.replace(microsecond=999_999))


class ContentHash:
    """The SHA-256 of a file's content, decrypted; of a larger file, of its first ``limit`` bytes."""

    def __init__(self, limit: int | None) -> None:
        self._hash = hashlib.sha256()
        self._left = limit

    def update(self, piece: bytes) -> bool:
        """Add the next piece. Return whether more is needed."""
        self._hash.update(piece[: self._left])
        if self._left is None:
            return bool(piece)
        self._left = max(0, self._left - len(piece))
        return bool(piece) and self._left > 0

    def hexdigest(self) -> str:
        """Return the hash in hexadecimal."""
        return self._hash.hexdigest()


def hash_content(zone: Zone, name: str, limit: int | None = None) -> str:
    """Return the ContentHash of a file in hexadecimal. Raises StoreError."""
    content = ContentHash(limit)
    with zone.open(name) as stream:
        try:
            while content.update(stream.read(_READ_BYTES)):
                pass
        except EOFError:
            raise StoreError("an encrypted file of the landing zone is truncated: post its content again") from None
    return content.hexdigest()


def open_zone(url: str, *, bucket: Callable[[str], Bucket]) -> Zone:
    """Return the zone at a folder or ``s3://bucket/prefix``. Raises ConfigurationError for another scheme."""
    if url.startswith("s3://"):
        return BucketZone(bucket(url))
    if "://" in url and not url.startswith("file://"):
        raise ConfigurationError(
            f"FHIR_LANDING_URL: {url.split('://')[0]}:// is not supported; set a folder or s3://bucket/prefix"
        )
    return FolderZone(Path(url.removeprefix("file://")).expanduser().absolute())
