"""Errors of the operating system, by their errno, and those of SQLite about its file."""

import errno
import os

from fhir_assets.errors import (
    ConfigurationError,
    FhirAssetsError,
    OutOfResources,
    PermanentError,
    StoreError,
    StoreForbidden,
    StoreFull,
    StoreUnavailable,
)
from fhir_assets.process_ends import MEMORY_ADVICE

_ERRORS: dict[int, tuple[type[FhirAssetsError], str]] = {
    errno.ENOSPC: (OutOfResources, "free space, then try again"),
    errno.EDQUOT: (OutOfResources, "free space, or raise the quota, then try again"),
    errno.EFBIG: (ConfigurationError, "raise the limit of file sizes (ulimit -f), or free space"),
    errno.EROFS: (ConfigurationError, "mount the file system for writing, or set another folder"),
    errno.EACCES: (ConfigurationError, "give the account of this process the right"),
    errno.EPERM: (ConfigurationError, "give the account of this process the right"),
    errno.ENOENT: (ConfigurationError, "create it, or correct the setting that names it"),
    errno.ENOTDIR: (ConfigurationError, "correct the setting that names it"),
    errno.EISDIR: (ConfigurationError, "correct the setting that names it"),
    errno.ELOOP: (ConfigurationError, "correct the links, or the setting that names it"),
    errno.ENAMETOOLONG: (ConfigurationError, "shorten the name"),
    errno.EADDRINUSE: (ConfigurationError, "another program uses the port: end it, or set another port"),
    errno.EADDRNOTAVAIL: (ConfigurationError, "this machine does not have the address: set another"),
    errno.ENOMEM: (OutOfResources, "give the process more memory, or run fewer at once, then try again"),
    errno.EMFILE: (OutOfResources, "raise the limit of open files (ulimit -n), then try again"),
    errno.ENFILE: (OutOfResources, "raise the machine's limit of open files, then try again"),
    errno.EAGAIN: (OutOfResources, "raise the limit of processes (ulimit -u), or run fewer at once, then try again"),
    errno.ENOLCK: (OutOfResources, "the file system has no lock left: try again"),
    errno.EIO: (OutOfResources, "check the disk and the kernel's log, then try again"),
    errno.ESTALE: (OutOfResources, "mount the network file system again, then try again"),
    errno.ETXTBSY: (OutOfResources, "another process uses the file: try again"),
}

_SQLITE_ERRORS: dict[int, tuple[type[FhirAssetsError], str]] = {
    5: (OutOfResources, "another process holds it: try again"),
    6: (OutOfResources, "another process holds it: try again"),
    13: (OutOfResources, "its disk is full: free space, then try again"),
    10: (OutOfResources, "its disk cannot be read or written: check it, then try again"),
    7: (OutOfResources, "there is not enough memory: give the process more, then try again"),
    8: (ConfigurationError, "it may not be written: give this account the right"),
    3: (ConfigurationError, "it may not be opened: give this account the right"),
    14: (ConfigurationError, "it cannot be opened: create its folder, or give the right"),
    11: (PermanentError, "it is damaged: restore or remove it"),
    26: (PermanentError, "it is not a database: restore or remove it"),
}


_STORE_ERRORS: dict[type[FhirAssetsError], type[StoreError]] = {
    OutOfResources: StoreFull,
    ConfigurationError: StoreForbidden,
}
_UNAVAILABLE = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOLCK}
_NAMES = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


def choose_error(error: OSError) -> type[FhirAssetsError]:
    """Return OutOfResources if the call of ``error`` may succeed later, otherwise ConfigurationError."""
    kind, _ = _ERRORS.get(error.errno or 0, (ConfigurationError, ""))
    return OutOfResources if kind is OutOfResources else ConfigurationError


def choose_store_error(error: OSError) -> type[StoreError]:
    """Return the kind of StoreError for an error of a folder of the store: full, forbidden, unavailable or other."""
    if error.errno in _UNAVAILABLE:
        return StoreUnavailable
    if error.errno in _NAMES or error.errno not in _ERRORS:
        return StoreError
    return _STORE_ERRORS[choose_error(error)]


def translate_system_error(error: BaseException, *, with_names: bool) -> FhirAssetsError | None:
    """Return the error of the project for an OSError, a MemoryError or an error of SQLite; None for others."""
    if isinstance(error, MemoryError):
        return OutOfResources(f"the process got no memory, but goes on: {MEMORY_ADVICE}, then try again")
    if type(error).__module__ == "sqlite3":
        code = getattr(error, "sqlite_errorcode", None) or 0
        kind, advice = _SQLITE_ERRORS.get(code & 0xFF, (None, ""))
        return kind(f"a database of SQLite cannot be used: {advice}") if kind else None
    if not isinstance(error, OSError) or error.errno not in _ERRORS:
        return None
    kind, advice = _ERRORS[error.errno]
    name = f"{os.fsdecode(error.filename)}: " if with_names and isinstance(error.filename, str | bytes) else ""
    return kind(f"{name}{os.strerror(error.errno)}: {advice}")
