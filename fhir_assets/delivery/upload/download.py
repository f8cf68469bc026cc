"""Downloads the NDJSON files of a bucket to a local folder, from which an upload reads them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fhir_assets.atomic_files import replace_file
from fhir_assets.delivery.upload.files import is_ndjson
from fhir_assets.errors import ConfigurationError, StoreError
from fhir_assets.file_modes import create_folders
from fhir_assets.storage.blobs import Blobs, ListedFile


def list_files(blobs: Blobs) -> list[ListedFile]:
    """Return the NDJSON files, by name. Raises ConfigurationError if there is none, StoreError."""
    files = sorted((file for file in blobs.listing("") if is_ndjson(file.name)), key=lambda file: file.name)
    if not files:
        raise ConfigurationError(f"--input {blobs.url}: there is no .ndjson or .ndjson.gz file")
    return files


def download_files(blobs: Blobs, folder: Path, report: Callable[[ListedFile], None]) -> None:
    """Copy the NDJSON files to ``folder``, readable by the user only, with their times of modification.

    What an earlier download has left in ``folder`` is removed first. ``report`` is called with each file. Raises
    ConfigurationError if there is no file or the folder cannot be written, and StoreError.
    """
    files = list_files(blobs)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        create_folders(folder)
        for file in files:
            path = folder / file.name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise StoreError(f"{blobs.url}/{file.name}: the name of a file must not lead out of its folder")
            report(file)
            _copy(blobs, file, path)
    except OSError as error:
        raise ConfigurationError(f"cannot write {folder}: {error.strerror}; free space, then run it again") from None


def _copy(blobs: Blobs, file: ListedFile, path: Path) -> None:
    create_folders(path.parent)
    with blobs.open(file.name) as source, replace_file(path) as target:
        shutil.copyfileobj(source, target, 1 << 20)
    if path.stat().st_size != file.bytes:
        path.unlink()
        raise StoreError(f"{blobs.url}/{file.name} changed while it was read: start the upload again")
    os.utime(path, (file.modified.timestamp(), file.modified.timestamp()))
