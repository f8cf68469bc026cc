"""Files that others put into a folder: listed and opened without following a link or waiting for a device.

Every folder on the way is opened relative to the one above it and without following links, so that no name, and no
change of a name between the listing and the opening, leads out of the folder.
"""

import errno
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final, cast

LINK: Final = "a link, which is not followed: put the file itself there"
LINKED_FOLDER: Final = "a link to a folder, which is not followed: put the files themselves there"
BROKEN_LINK: Final = "a link without an end, which is not followed: remove it"
SPECIAL: Final = "a pipe, a device or a socket, not a file: remove it"
FOLDER: Final = "a folder, not a file"
EMPTY_FOLDER: Final = "an empty folder: put files into it, or remove it"
NOT_UTF_8: Final = "its name is not UTF-8: rename it"
LONG_NAME: Final = "its path is longer than 1,000 bytes: shorten it"
TOO_DEEP: Final = "a folder more than 64 levels deep: move its files up"

BY_NAME: Final = frozenset({LINK, SPECIAL, EMPTY_FOLDER, NOT_UTF_8, LONG_NAME})
"""The faults that matter only if the name is that of a file to read. Others may hide such files."""

MAX_NAME_BYTES: Final = 1000
_MAX_DEPTH: Final = 64
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file below a folder: its path from there with ``/``, and its status.

    ``fault`` is the reason why it cannot be read, None if it is a file. The path of a file with a fault may be that of
    a folder; bytes that are not UTF-8 are surrogates, as ``os.fsdecode`` returns them.
    """

    name: str
    size: int
    modified_ns: int
    fault: str | None = None


def walk_files(root: Path) -> Iterator[FoundFile]:
    """Yield everything below a folder but hidden names and folders with content, in the order of their names.

    What disappears meanwhile is left out. Raises OSError if ``root`` itself, which may be a link, cannot be read.
    """
    folder = os.open(root, _FOLDER)
    try:
        yield from _walk(folder, "", 1)
    finally:
        os.close(folder)


def find_readable(root: Path, pattern: re.Pattern[str]) -> tuple[list[FoundFile], list[FoundFile]]:
    """Return the files below a folder whose name has the pattern, and those of them that cannot be read.

    The latter include folders that cannot be read; names that are only not UTF-8 or long make no file unreadable here.
    Raises OSError if ``root`` cannot be read.
    """
    files, faulty = [], []
    for found in walk_files(root):
        if not pattern.search(found.name.rpartition("/")[2]) and found.fault in (None, *BY_NAME):
            continue
        if found.fault not in (None, NOT_UTF_8, LONG_NAME):
            faulty.append(found)
        elif not os.access(root / found.name, os.R_OK, follow_symlinks=False):
            faulty.append(replace(found, fault=os.strerror(errno.EACCES)))
        else:
            files.append(found)
    return files, faulty


def open_file(root: Path, name: str, error: Callable[[str], Exception]) -> BinaryIO:
    """Open the file ``name`` below a folder. Its stream ends where the file ended when it was opened.

    Raises ``error`` with the reason, here and while it is read, if it is not a file, is below a link, or changes its
    size meanwhile.
    """
    *folders, last = name.split("/")
    if any(part in ("", ".", "..") for part in (*folders, last)):
        raise error("not the name of a file below this folder")
    opened: list[int] = []
    try:
        opened.append(os.open(root, _FOLDER))
        for part in folders:
            opened.append(os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=opened[-1]))
        if fault := _find_fault(opened[-1], last, os.stat(last, dir_fd=opened[-1], follow_symlinks=False)):
            raise error(fault)
        # Without O_NONBLOCK the opening of a pipe, which took the place of the file since, waits for its writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return cast(BinaryIO, io.BufferedReader(_File(os.open(last, flags, dir_fd=opened[-1]), error)))
    except OSError as cause:
        raise error(_describe(cause)) from None
    finally:
        for folder in opened:
            os.close(folder)


def open_regular(path: str, *, follow: bool = False) -> BinaryIO:
    """Open a file for reading, at once even if it is a pipe. Raises OSError with the reason if it is not a file.

    A link is one that is not a file, unless ``follow`` is true.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, BROKEN_LINK if follow else LINK) from None
        if error.errno == errno.ENXIO:  # a socket
            raise OSError(errno.ENXIO, SPECIAL) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, FOLDER if stat.S_ISDIR(mode) else SPECIAL)
    return open(descriptor, "rb")


def walk_regular(root: str) -> Iterator[str]:
    """Yield the paths of the files below a folder, below it by name; nothing if there is no folder.

    Links, pipes, devices and sockets are left out, and links to folders are not followed. Raises OSError if a folder
    cannot be read.
    """
    folders = [""]
    while folders:
        prefix = folders.pop()
        below = []
        try:
            with os.scandir(f"{root}/{prefix}") as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                below.append(f"{prefix}{entry.name}/")
            elif entry.is_file(follow_symlinks=False):
                yield prefix + entry.name
        folders += reversed(below)


class _File(io.RawIOBase):
    """A file up to the size that it had when it was opened, which cannot be searched."""

    def __init__(self, descriptor: int, error: Callable[[str], Exception]) -> None:
        self._file = io.FileIO(descriptor)
        self._error = error
        status = os.fstat(descriptor)
        self._left = self._size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise error(SPECIAL)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        try:
            count = self._file.readinto(memoryview(buffer)[: self._left]) or 0
            changed = not count and os.fstat(self._file.fileno()).st_size != self._size
        except OSError as cause:
            raise self._error(_describe(cause)) from None
        if changed:
            raise self._error("it changed while it was read")
        self._left -= count
        return count


def _walk(folder: int, prefix: str, depth: int) -> Iterator[FoundFile]:
    for name in sorted(os.listdir(folder)):
        if name.startswith("."):
            continue
        path = prefix + name
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                fault = _find_fault(folder, name, status) or find_fault_of_name(path)
                yield FoundFile(path, status.st_size, status.st_mtime_ns, fault)
                continue
            if depth > _MAX_DEPTH:
                yield FoundFile(path, 0, status.st_mtime_ns, TOO_DEEP)
                continue
            below = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
        except FileNotFoundError:
            continue  # deleted since it was listed
        except OSError as error:
            yield FoundFile(path, 0, 0, _describe(error))
            continue
        try:
            if not os.listdir(below):
                yield FoundFile(path, 0, status.st_mtime_ns, EMPTY_FOLDER)
            yield from _walk(below, path + "/", depth + 1)
        except OSError as error:
            yield FoundFile(path, 0, status.st_mtime_ns, _describe(error))
        finally:
            os.close(below)


def _find_fault(folder: int, name: str, status: os.stat_result) -> str | None:
    """Return why an entry of a folder is not a file, None if it is one."""
    if stat.S_ISREG(status.st_mode):
        return None
    if not stat.S_ISLNK(status.st_mode):
        return SPECIAL
    with suppress(OSError):
        return LINKED_FOLDER if stat.S_ISDIR(os.stat(name, dir_fd=folder).st_mode) else LINK
    return BROKEN_LINK


def find_fault_of_name(path: str) -> str | None:
    """Return why a path cannot be stored in the database, None if it can."""
    try:
        return LONG_NAME if len(path.encode()) > MAX_NAME_BYTES else None
    except UnicodeEncodeError:
        return NOT_UTF_8


def _describe(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
