"""The IO manager ``ndjson``: describes partitions of raw and validated, and gives their manifests to downstream steps.

It writes no partition: a step commits its partitions before it outputs them, see ``steps.layers``.
"""

import logging
from collections.abc import Sequence
from typing import Any

import dagster as dg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError, StoreError
from fhir_assets.orchestration.failures import sanitized_errors
from fhir_assets.orchestration.window_materializations import log_window_materializations
from fhir_assets.orchestration.window_metadata import PARTITION_ROW_COUNT, ROW_COUNT, add_window_metadata
from fhir_assets.pipeline.partition_rows import count_rows
from fhir_assets.steps.layers import FetchedType, ValidatedType
from fhir_assets.storage.manifest import Manifest
from fhir_assets.storage.store import Store, partition_folder

_log = logging.getLogger(__name__)


class NdjsonIOManager(dg.IOManager):
    """Describes the partitions that a step outputs; gives downstream steps the manifests of the run's partitions."""

    def __init__(self, store: Store, warehouse: Warehouse) -> None:
        self._store = store
        self._warehouse = warehouse

    def handle_output(self, context: dg.OutputContext, obj: FetchedType | ValidatedType) -> None:
        """Add the sizes and places of the partitions to the materializations of their windows.

        The materialization of the run's newest window has the row count of all partitions.
        """
        if not isinstance(obj, FetchedType | ValidatedType):
            raise ConfigurationError(
                f"the IO manager ndjson cannot store a {type(obj).__name__}: it describes partitions that raw "
                "or validated has committed"
            )
        if obj.manifests:
            self._add_metadata(context, obj.manifests)
        log_window_materializations(context)

    def _add_metadata(self, context: dg.OutputContext, manifests: Sequence[Manifest]) -> None:
        with sanitized_errors():
            newest = manifests[-1]
            rows = self._count_rows(newest)
        if len(context.asset_partition_keys) == 1:
            context.add_output_metadata({"run_windows_written": len(manifests)})
        url = self._store.blobs.url
        metadata: dict[str, dict[str, Any]] = {
            manifest.partition_key: {
                PARTITION_ROW_COUNT: manifest.rows,
                "bytes": manifest.bytes,
                "stored_bytes": manifest.stored_bytes,
                "path": dg.MetadataValue.path(f"{url}/{_folder(manifest)}"),
            }
            for manifest in manifests
        }
        if rows is not None:
            metadata[newest.partition_key][ROW_COUNT] = rows
        add_window_metadata(context.step_context, context.asset_key, metadata)

    def _count_rows(self, manifest: Manifest) -> int | None:
        """Return the row count of the asset of a manifest; None if a manifest of another window cannot be read."""
        try:
            return count_rows(self._warehouse.connect, self._store, manifest.layer, manifest.resource_type)
        except StoreError as error:
            _log.warning("the row count of the asset is unknown", extra={"reason": str(error)})
            return None

    def load_input(self, context: dg.InputContext) -> Sequence[Manifest]:
        """Return the manifests of the run's partitions; a partition that was never written has no manifest."""
        layer, key = context.asset_key.path
        return self._store.manifests(layer, key, context.asset_partition_keys)


def _folder(manifest: Manifest) -> str:
    return partition_folder(manifest.layer, manifest.resource_type, manifest.partition_key)
