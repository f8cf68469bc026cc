"""Where bytes live: a folder, or anything else that offers these few calls."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Protocol

from fhir_assets.errors import StoreError

UNFINISHED = ".tmp"
"""How the names of files end that are being written; of a process that was killed they stay."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A name, how many bytes are under it, and since when."""

    name: str
    bytes: int
    modified: datetime


class Blobs(Protocol):
    """Named bytes. Names are relative paths with ``/``; what is put appears whole or not at all."""

    url: str

    def spool(self) -> Path:
        """A local folder, on the same disk where there is one, in which files grow before they are put."""
        ...

    def put_file(self, name: str, path: Path) -> None:
        """Move the local file ``path`` to ``name``."""
        ...

    def put(self, name: str, content: bytes) -> None:
        """Write or replace ``name`` in one step."""
        ...

    def get(self, name: str) -> bytes | None:
        """The content of ``name``, None if there is none."""
        ...

    def open(self, name: str) -> BinaryIO:
        """``name`` as a stream. Raises StoreError if there is none."""
        ...

    def names(self, prefix: str) -> Iterator[str]:
        """Every name that begins with the folder ``prefix``."""
        ...

    def listing(self, prefix: str) -> Iterator[Listed]:
        """As ``names``, with sizes and ages."""
        ...

    def delete(self, name: str) -> None:
        """Remove ``name`` if it is there."""
        ...


@contextmanager
def _disk_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot {what}: {error.strerror or type(error).__name__}. Free space or mend the "
            "rights of the store's folder (FHIR_STORE_URL), then run the partition again"
        ) from None


def _write(path: str, content: bytes) -> None:
    """A new file, complete and on the disk, or none."""
    with open(path, "xb", buffering=0) as file:
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            os.unlink(path)
            raise


class LocalBlobs:
    """A folder. A file is complete and on the disk before its name appears."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)
        self._spool = root / ".spool"

    def spool(self) -> Path:
        with _disk_errors(f"write to {self.root}"):
            self._spool.mkdir(parents=True, exist_ok=True)
        return self._spool

    def put_file(self, name: str, path: Path) -> None:
        target = self.root / name
        with _disk_errors(f"write {target}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(target)

    def put(self, name: str, content: bytes) -> None:
        target = f"{self.root}/{name}"
        folder, _, file = target.rpartition("/")
        # Beside its place and not in the spool: there a disk has to look long for room among so many small files.
        path = f"{folder}/.{file}.{os.urandom(8).hex()}{UNFINISHED}"
        with _disk_errors(f"write {target}"):
            try:
                _write(path, content)
            except FileNotFoundError:
                os.makedirs(folder, exist_ok=True)
                _write(path, content)
            os.replace(path, target)

    def get(self, name: str) -> bytes | None:
        with _disk_errors(f"read {self.root}/{name}"):
            try:
                with open(f"{self.root}/{name}", "rb", buffering=0) as file:
                    return file.read()
            except FileNotFoundError:
                return None

    def open(self, name: str) -> BinaryIO:
        with _disk_errors(f"read {self.root / name}"):
            return (self.root / name).open("rb")

    def names(self, prefix: str) -> Iterator[str]:
        for folder, _, files in os.walk(self.root / prefix):
            for file in sorted(files):
                yield (Path(folder) / file).relative_to(self.root).as_posix()

    def listing(self, prefix: str) -> Iterator[Listed]:
        for name in self.names(prefix):
            with suppress(FileNotFoundError):
                found = (self.root / name).stat()
                yield Listed(name, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.root, ignore_errors=True)
