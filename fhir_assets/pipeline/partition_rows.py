"""The number of resources in all partitions of a layer and a type."""

from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import partition_rows
from fhir_assets.warehouse.postgres.db.connections import OpenSession


def count_rows(connect: OpenSession, store: Store, layer: str, resource_type: str) -> int:
    """Return how many resources the committed partitions have.

    The number of a partition that was committed before numbers were recorded, or by a process that was killed, is read
    from its manifest. Raises DatabaseUnavailable or StoreError.
    """
    with connect() as conn:
        count, unknown = partition_rows.count_all(conn, layer, resource_type)
        if unknown:
            manifests = store.manifests(layer, resource_type, unknown)
            missing = dict.fromkeys(unknown, 0) | {manifest.partition_key: manifest.rows for manifest in manifests}
            partition_rows.record_missing(conn, layer, resource_type, missing)
            conn.commit()
            count += sum(missing.values())
    return count
