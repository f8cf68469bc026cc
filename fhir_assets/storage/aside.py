"""Partitions that are set aside: their manifests are moved to the folder ``aside``, so that readers ignore them.

Their parts stay in place. Because no manifest of a layer names them any more, `fhir-assets prune` removes them when
they are old enough; until then, the manifests can be moved back.
"""

from collections.abc import Iterable
from datetime import datetime

import msgspec

from fhir_assets.storage.manifest import Manifest
from fhir_assets.storage.store import Store, map_concurrently, partition_folder

FOLDER = "aside"


def read_all_manifests(store: Store, layer: str) -> list[Manifest]:
    """Return the manifests of all partitions of a layer, of every type. Raises StoreError."""
    names = [name for name in store.blobs.names(layer) if name.endswith("/manifest.json")]
    return [manifest for manifest in map_concurrently(lambda name: store.read_manifest(name, layer), names) if manifest]


def copy_aside(store: Store, manifests: Iterable[Manifest], at: datetime) -> None:
    """Copy manifests to a folder of ``aside`` that is named after the time ``at``. Raises StoreError."""

    def copy(manifest: Manifest) -> None:
        folder = partition_folder(manifest.layer, manifest.resource_type, manifest.partition_key)
        content = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        store.blobs.put(f"{FOLDER}/{at:%Y%m%dT%H%M%S}/{folder}/manifest.json", content)

    map_concurrently(copy, manifests)


def remove_manifest(store: Store, manifest: Manifest) -> None:
    """Delete the manifest of a partition. Raises StoreError."""
    folder = partition_folder(manifest.layer, manifest.resource_type, manifest.partition_key)
    store.blobs.delete(f"{folder}/manifest.json")
