"""Atomic replacement of local files: at any time, a file has either its earlier or its complete new content.

The new content is written to a temporary file in the same folder, flushed to the disk and renamed. A failure deletes
the temporary file. A killed process leaves it behind; its name begins with ``.`` and ends with ``.tmp``, so that it is
not mistaken for a result.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fhir_assets.file_modes import PRIVATE

UNFINISHED = ".tmp"
"""The suffix of files that are being written. A killed process leaves them behind."""

_NAME_CHARACTERS = 50
"""The number of characters of a name that the name of its temporary file repeats; names are limited to 255 bytes."""

_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")
_STANDARD_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}


@contextmanager
def replace_file(path: Path, *, mode: int = PRIVATE) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under ``path`` when the ``with`` block ends without an error.

    ``mode`` is the permissions of a new file before the umask is applied; by default only its owner may read it. An
    existing file keeps its permissions and, if the process may set it, its owner. If ``path`` is a symbolic link, the
    file that it points to is replaced. A device, a named pipe or an open descriptor (``/dev/stdout``, ``/dev/fd/3``) is
    written directly. Raises OSError, for example if the process may not write to an existing file.
    """
    if (descriptor := _find_descriptor(path)) is not None:
        with open(os.dup(descriptor), "wb") as stream:
            yield stream
        return
    target = Path(os.path.realpath(path))
    existing = _stat(target)
    if existing is not None and not stat.S_ISREG(existing.st_mode):
        with target.open("wb") as stream:
            yield stream
        return
    if existing is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    temporary = build_temporary_path(target)
    permissions = stat.S_IMODE(existing.st_mode) if existing else mode
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, permissions & 0o777)) as file:
            if existing is not None:
                _copy_owner_and_mode(file.fileno(), existing)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


def replace_content(path: Path, content: bytes, *, mode: int = PRIVATE) -> None:
    """Replace the content of a file, as ``replace_file`` does. Raises OSError."""
    with replace_file(path, mode=mode) as file:
        file.write(content)


def build_temporary_path(target: Path) -> Path:
    """Return the path of a new temporary file in the folder of ``target``."""
    return target.with_name(f".{target.name[:_NAME_CHARACTERS]}.{os.urandom(8).hex()}{UNFINISHED}")


def _find_descriptor(path: Path) -> int | None:
    """Return the number of the open descriptor that the path names, None if it names a file."""
    text = str(path)
    match = _DESCRIPTOR.fullmatch(text)
    return int(match[1]) if match else _STANDARD_STREAMS.get(text)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _copy_owner_and_mode(descriptor: int, existing: os.stat_result) -> None:
    """Give a new file the owner and the permissions of the file that it replaces."""
    with suppress(PermissionError):
        os.fchown(descriptor, existing.st_uid, existing.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(existing.st_mode))


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk. Do nothing if the file system does not support this."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
