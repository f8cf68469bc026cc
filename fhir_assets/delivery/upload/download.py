"""Downloads the NDJSON files of a bucket to a local folder, from which an upload reads them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fhir_assets.atomic_files import replace_file
from fhir_assets.delivery.upload.files import is_ndjson
from fhir_assets.errors import ConfigurationError, StoreError
from fhir_assets.storage.blobs import Blobs, ListedFile


def list_files(blobs: Blobs) -> list[ListedFile]:
    """Return the NDJSON files, by name. Raises ConfigurationError if there is none, StoreError."""
    files = sorted((file for file in blobs.listing("") if is_ndjson(file.name)), key=lambda file: file.name)
    if not files:
        raise ConfigurationError(f"--input {blobs.url}: there is no .ndjson or .ndjson.gz file")
    return files


def download_files(blobs: Blobs, folder: Path, report: Callable[[ListedFile], None]) -> None:
    """Copy the NDJSON files to ``folder``, readable by the user only, and remove other files from it.

    A file is not copied if the folder already has it with the same size and time of modification. ``report`` is called
    with each file that is copied. Raises ConfigurationError if there is no file or the folder cannot be written, and
    StoreError.
    """
    files = list_files(blobs)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in set(folder.rglob("*")) - {folder / file.name for file in files}:
            if path.is_file():
                path.unlink()
        for file in files:
            path = folder / file.name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise StoreError(f"{blobs.url}/{file.name}: the name of a file must not lead out of its folder")
            if not _is_copied(path, file):
                report(file)
                _copy(blobs, file, path)
    except OSError as error:
        raise ConfigurationError(f"cannot write {folder}: {error.strerror}; free space, then run it again") from None


def _is_copied(path: Path, file: ListedFile) -> bool:
    if not path.is_file():
        return False
    stat = path.stat()
    return stat.st_size == file.bytes and stat.st_mtime == file.modified.timestamp()


def _copy(blobs: Blobs, file: ListedFile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with blobs.open(file.name) as source, replace_file(path, mode=0o600) as target:
        shutil.copyfileobj(source, target, 1 << 20)
    if path.stat().st_size != file.bytes:
        path.unlink()
        raise StoreError(f"{blobs.url}/{file.name} changed while it was read: start the upload again")
    os.utime(path, (file.modified.timestamp(), file.modified.timestamp()))
