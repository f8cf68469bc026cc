"""The permissions of the files and folders that the project creates.

Only their owner may read them (0600 and 0700), whatever the umask. The lake and exports, which other accounts read,
have the permissions of FHIR_FILE_MODE. Existing folders keep their permissions, unless ``narrow_folder`` is called.

The umask is a second protection, for files that libraries create. Every process of the project restricts it when it
starts. The import of the package does not change it, because the package may be a part of another program.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

PRIVATE = 0o600
"""The permissions of a file that only its owner may read."""

_OTHERS = 0o077
_READ = 0o444


def restrict_umask() -> None:
    """Let only the owner read the files that this process and its child processes create. Call it at the start."""
    os.umask(os.umask(_OTHERS) | _OTHERS)


def parse_file_mode(text: str | int) -> int:
    """Return the permissions of an octal number such as ``0640``, given as text, or of a number. Raises ValueError.

    The owner reads and writes, others may read at most: a file of a lake or an export is never changed by others.
    """
    try:
        mode = int(text, 8) if isinstance(text, str) else text
    except ValueError:
        mode = -1
    if mode & ~_READ != PRIVATE & ~_READ or not mode & 0o400:
        raise ValueError(
            "it is an octal number: 0600 for the owner only, 0640 for its group to read, 0644 for every account to read"
        )
    return mode


def find_folder_mode(mode: int) -> int:
    """Return the permissions of a folder whose files have ``mode``: who may read the files may enter the folder."""
    return mode | 0o100 | (mode & _READ) >> 2


def set_file_mode(descriptor: int, mode: int) -> None:
    """Set the permissions of an open file of this user, whatever the umask. Raises OSError."""
    if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
        # A file system without permissions, such as that of a USB stick, refuses to change them.
        with suppress(PermissionError):
            os.fchmod(descriptor, mode)


def create_folders(folder: Path, *, mode: int = PRIVATE) -> None:
    """Create a folder and its missing parents, for files with the permissions ``mode``. Raises OSError."""
    _create_missing(folder, find_folder_mode(mode))


def create_home(home: Path) -> None:
    """Create FHIR_ASSETS_HOME unless it exists. Raises OSError.

    In a home of root, the embedded Postgres runs as another user. That user may pass through the home, but not list it.
    """
    _create_missing(home, 0o711 if os.geteuid() == 0 else 0o700)


def narrow_folder(folder: Path) -> None:
    """Take the permissions of group and others from a folder of this user, for example one of an earlier version.

    What is in it becomes unreachable for them. A folder that does not exist or belongs to another user is not changed.
    """
    with suppress(OSError):
        status = folder.stat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and status.st_mode & _OTHERS:
            _set_permissions(folder, status.st_mode & 0o700)


def _create_missing(folder: Path, permissions: int) -> None:
    try:
        folder.mkdir(0o700)
    except FileNotFoundError:
        _create_missing(folder.parent, permissions)
        _create_missing(folder, permissions)
    except FileExistsError:
        if not folder.is_dir():
            raise
    else:
        _set_permissions(folder, permissions)


def _set_permissions(folder: Path, mode: int) -> None:
    """Set the permissions of a folder. Its set-group-ID bit, which gives new files the folder's group, is kept."""
    before = stat.S_IMODE(folder.stat().st_mode)
    if before & 0o777 != mode:
        with suppress(PermissionError):  # as of set_file_mode
            folder.chmod(before & 0o7000 | mode)
