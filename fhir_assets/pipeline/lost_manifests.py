"""Detects manifests that were written before and cannot be found any more: the store was deleted or replaced."""

from collections.abc import Collection, Sequence

from fhir_assets.errors import StoreError
from fhir_assets.storage.manifest import Manifest
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import received, runs
from fhir_assets.warehouse.postgres.db.connections import Connection


def require_manifests(
    conn: Connection,
    store: Store,
    run_id: str,
    layer: str,
    resource_type: str,
    partition_keys: Collection[str],
    manifests: Sequence[Manifest],
) -> None:
    """Raise StoreError if a manifest is missing that this run has written, or whose resources are waiting to be loaded.

    ``manifests`` are those that the step found in ``layer`` among its ``partition_keys``.
    """
    written = set(runs.find_written_windows(conn, run_id, resource_type, layer)).intersection(partition_keys)
    if layer == "raw":
        written.update(received.find_pending_windows(conn, resource_type, list(partition_keys)))
    lost = sorted(written.difference(manifest.partition_key for manifest in manifests))
    if lost:
        others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise StoreError(
            f"{store.blobs.url} does not have {layer}/{resource_type} of {lost[0]}{others}, which was written to it "
            "before: is FHIR_STORE_URL the same for all processes, and does the store still exist? Restore it, or load "
            "these windows with a full refresh"
        )
