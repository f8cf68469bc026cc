"""Files that can be deleted: parts that no manifest names, and unfinished files of killed runs."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import groupby

from fhir_assets.atomic_files import UNFINISHED
from fhir_assets.storage.blobs import Blobs, ListedFile
from fhir_assets.storage.encrypted_parts import SUFFIX
from fhir_assets.storage.store import Store

_PARTS = (".ndjson.gz", f".ndjson.gz{SUFFIX}", UNFINISHED)

_MAX_AGE = timedelta(days=1)
"""The age from which a file in the spool cannot belong to a running process."""

_DEPTH = 2
"""The slashes in the folder of a partition. A file in another folder is not one of the store, and is kept."""


def find_unreferenced_parts(store: Store, layer: str, *, before: datetime) -> Iterator[ListedFile]:
    """Yield the parts of a layer that no manifest names and that were written before ``before``.

    A part is written before the manifest that names it, so ``before`` must be earlier than the start of every load that
    is running.
    """
    listing = sorted(store.blobs.listing(layer), key=lambda file: file.name)
    for folder, files in groupby(listing, key=lambda file: file.name.rpartition("/")[0]):
        old = [file for file in files if file.modified < before and file.name.endswith(_PARTS)]
        if not old or folder.count("/") != _DEPTH:
            continue
        _, resource_type, partition_key = folder.split("/")
        manifest = store.manifest(layer, resource_type, partition_key)
        named = {part.name for part in manifest.parts} if manifest else set()
        yield from (file for file in old if file.name not in named)


def find_unfinished_files(blobs: Blobs, *, before: datetime) -> Iterator[ListedFile]:
    """Return the unfinished files in the spool of a local folder that were written before ``before``."""
    return (file for file in blobs.listing(".spool") if file.modified < before)


def remove_unfinished_files(blobs: Blobs) -> None:
    """Delete the files in the spool of a local folder that killed processes left there more than a day ago."""
    if blobs.local:
        for file in list(find_unfinished_files(blobs, before=datetime.now(UTC) - _MAX_AGE)):
            blobs.delete(file.name)
