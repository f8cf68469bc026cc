"""Named files: the interface ``Blobs`` and its implementation in a local folder.

The implementation for S3 is in ``s3.py``.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Protocol

from fhir_assets.atomic_files import UNFINISHED
from fhir_assets.errors import FileMissing, StoreError
from fhir_assets.file_modes import PRIVATE, create_folders, set_file_mode
from fhir_assets.foreign_errors import choose_store_error
from fhir_assets.local_files import FOLDER, LINK, LINKED_FOLDER, SPECIAL, open_regular, walk_regular

SPOOL_FOLDER = ".spool"
"""The folder for unfinished files in a local folder."""


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file in a listing: its name, its size in bytes and its time of modification."""

    name: str
    bytes: int
    modified: datetime


class Blobs(Protocol):
    """Named files. Names are relative paths with ``/``. A file appears under its name complete or not at all.

    ``local`` states whether ``put_file`` only renames a spooled file, which is fast and needs no additional space.
    """

    url: str
    local: bool

    def spool(self) -> Path:
        """Return a local folder for files that ``put_file`` moves later, on the same disk if possible."""
        ...

    def create_spooled(self, suffix: str) -> Path:
        """Create an empty file in the spool. Another process may remove the spool at the same time."""
        ...

    def remove_spool(self) -> None:
        """Remove the spool if it is empty. If the spool is outside of the store, do nothing."""
        ...

    def put_file(self, name: str, path: Path) -> None:
        """Move the local file ``path`` to ``name``."""
        ...

    def put(self, name: str, content: bytes) -> None:
        """Write or replace ``name`` atomically."""
        ...

    def get(self, name: str) -> bytes | None:
        """Return the content of ``name``, or None if it does not exist."""
        ...

    def open(self, name: str) -> BinaryIO:
        """Open ``name`` for reading. Raises FileMissing if it does not exist, StoreError."""
        ...

    def names(self, prefix: str) -> Iterator[str]:
        """Yield every name below the folder ``prefix``."""
        ...

    def listing(self, prefix: str) -> Iterator[ListedFile]:
        """Yield the files below the folder ``prefix`` with sizes and times."""
        ...

    def delete(self, name: str) -> None:
        """Delete ``name`` if it exists."""
        ...


@contextmanager
def _translate_disk_errors(action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.strerror in (LINK, SPECIAL, FOLDER):
            raise StoreError(f"cannot {action}: it is {error.strerror}") from None
        raise choose_store_error(error)(
            f"cannot {action}: {error.strerror or type(error).__name__}. Free space or correct "
            "the permissions of the store's folder (FHIR_STORE_URL), then run the partition again"
        ) from None


def _create_private(path: str, flags: int) -> int:
    return os.open(path, flags, PRIVATE)


def _write(path: str, content: bytes, mode: int) -> None:
    """Create a file and flush it to the disk; delete it if that fails."""
    with open(path, "xb", buffering=0, opener=_create_private) as file:
        try:
            if mode != PRIVATE:
                set_file_mode(file.fileno(), mode)
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            os.unlink(path)
            raise


class LocalBlobs:
    """Files in a local folder. A file is complete and flushed to the disk before its name appears.

    ``mode`` is the permissions of the files, whatever the umask; folders that are created have matching ones.
    """

    local = True

    def __init__(self, root: Path, *, mode: int = PRIVATE) -> None:
        self.root = root
        self.mode = mode
        self.url = str(root)
        self._spool = root / SPOOL_FOLDER

    def spool(self) -> Path:
        """Return the folder ``.spool`` in the root, created if needed. Raises StoreError."""
        with _translate_disk_errors(f"write to {self.root}"):
            create_folders(self.root, mode=self.mode)
            if self._spool.is_symlink():
                raise StoreError(f"{self._spool} is {LINKED_FOLDER}")
            create_folders(self._spool)
        return self._spool

    def create_spooled(self, suffix: str) -> Path:
        """Create an empty file in the spool. Raises StoreError."""
        while True:
            path = self.spool() / f"{os.urandom(8).hex()}{suffix}{UNFINISHED}"
            with _translate_disk_errors(f"write to {self.root}"):
                # Another process may remove the folder as long as it is empty.
                with suppress(FileNotFoundError):
                    path.touch(PRIVATE, exist_ok=False)
                    return path

    def remove_spool(self) -> None:
        """Remove the folder ``.spool`` if it is empty, so that readers of the folder find only finished files."""
        with suppress(OSError):
            self._spool.rmdir()

    def put_file(self, name: str, path: Path) -> None:
        """Flush the local file ``path`` and move it to ``name``. Raises StoreError."""
        target = self.root / name
        with _translate_disk_errors(f"write {target}"):
            create_folders(target.parent, mode=self.mode)
            with open(path, "rb", buffering=0) as file:
                set_file_mode(file.fileno(), self.mode)
                os.fsync(file.fileno())
            path.replace(target)

    def put(self, name: str, content: bytes) -> None:
        """Write or replace ``name`` atomically. Raises StoreError."""
        target = f"{self.root}/{name}"
        folder, _, file = target.rpartition("/")
        # Small files are written next to their target, because many files in one spool folder slow the file system
        # down.
        path = f"{folder}/.{file}.{os.urandom(8).hex()}{UNFINISHED}"
        with _translate_disk_errors(f"write {target}"):
            try:
                _write(path, content, self.mode)
            except FileNotFoundError:
                create_folders(Path(folder), mode=self.mode)
                _write(path, content, self.mode)
            os.replace(path, target)

    def get(self, name: str) -> bytes | None:
        """Return the content of ``name``, or None if it does not exist. Raises StoreError."""
        try:
            with self.open(name) as file:
                return file.read()
        except FileMissing:
            return None

    def open(self, name: str) -> BinaryIO:
        """Open ``name`` for reading. Raises FileMissing if it does not exist, StoreError."""
        path = f"{self.root}/{name}"
        with _translate_disk_errors(f"read {path}"):
            try:
                return open_regular(path)
            except FileNotFoundError:
                raise FileMissing(
                    f"{self.url} does not have {name}: restore it from a backup, or materialize its raw partition "
                    "again with a full refresh"
                ) from None

    def names(self, prefix: str) -> Iterator[str]:
        """Yield the name of every file below the folder ``prefix``. Links, pipes and devices are left out.

        Raises StoreError if a folder cannot be read.
        """
        if prefix == SPOOL_FOLDER and self._spool.is_symlink():
            return
        folder = prefix.strip("/")
        with _translate_disk_errors(f"list {self.root / prefix}"):
            for name in walk_regular(f"{self.root}/{folder}"):
                yield f"{folder}/{name}" if folder else name

    def listing(self, prefix: str) -> Iterator[ListedFile]:
        """Yield the files below the folder ``prefix`` with sizes and times."""
        for name in self.names(prefix):
            with suppress(FileNotFoundError):
                status = (self.root / name).lstat()
                yield ListedFile(name, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    def delete(self, name: str) -> None:
        """Delete ``name`` if it exists."""
        (self.root / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the folder with all files."""
        shutil.rmtree(self.root, ignore_errors=True)
