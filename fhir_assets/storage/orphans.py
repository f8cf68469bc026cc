"""Parts that no manifest names, and unfinished files: what refreshed partitions and killed runs left behind."""

from collections.abc import Iterator
from datetime import datetime
from itertools import groupby

from fhir_assets.storage.blobs import UNFINISHED, Listed
from fhir_assets.storage.encrypted_parts import SUFFIX
from fhir_assets.storage.store import Store

_PARTS = (".ndjson.gz", f".ndjson.gz{SUFFIX}", UNFINISHED)


def unnamed_parts(store: Store, layer: str, *, before: datetime) -> Iterator[Listed]:
    """The parts of a layer that no manifest names and that were written before ``before``.

    A part is written before the manifest that names it, so ``before`` must lie before the start of every load that is
    at work.
    """
    listing = sorted(store.blobs.listing(layer), key=lambda found: found.name)
    for folder, files in groupby(listing, key=lambda found: found.name.rpartition("/")[0]):
        old = [file for file in files if file.modified < before and file.name.endswith(_PARTS)]
        if not old:
            continue
        _, resource_type, partition_key = folder.rsplit("/", 2)
        manifest = store.manifest(layer, resource_type, partition_key)
        named = {part.name for part in manifest.parts} if manifest else set()
        yield from (file for file in old if file.name not in named)


def left_in_spool(store: Store, *, before: datetime) -> Iterator[Listed]:
    """Files that a killed run was writing, of stores whose spool is in the store itself."""
    return (file for file in store.blobs.listing(".spool") if file.modified < before)
