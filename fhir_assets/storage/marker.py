"""``store.json``: the marker of a store, which names the store, the database that it belongs to, and its sources."""

import msgspec

from fhir_assets.errors import StoreError
from fhir_assets.storage.store import Store

MARKER = "store.json"
FORMAT = 1
"""The version of the store's layout. Stores with a greater number are refused."""


class StoreMarker(msgspec.Struct, frozen=True):
    """The identity of a store.

    ``database`` is the id of the database that has the checkpoints of the store's partitions. ``sources`` maps the name
    of each source to the settings with which its partitions were fetched.
    """

    id: str
    database: str
    sources: dict[str, dict[str, str]] = msgspec.field(default_factory=dict)
    format: int = FORMAT


_decoder = msgspec.json.Decoder(StoreMarker)


def read_marker(store: Store) -> StoreMarker | None:
    """Return the marker of a store, or None if it has none. Raises StoreError."""
    content = store.blobs.get(MARKER)
    if content is None:
        return None
    try:
        marker = _decoder.decode(content)
    except msgspec.DecodeError:
        raise StoreError(f"{store.blobs.url}/{MARKER} is damaged: restore it from a backup") from None
    if marker.format > FORMAT:
        raise StoreError(
            f"{store.blobs.url} has format {marker.format}, this version supports {FORMAT}: upgrade fhir-assets"
        )
    return marker


def write_marker(store: Store, marker: StoreMarker) -> None:
    """Write or replace the marker of a store. Raises StoreError."""
    store.blobs.put(MARKER, msgspec.json.format(msgspec.json.encode(marker), indent=1))
