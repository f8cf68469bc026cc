"""Partitions of NDJSON as Dagster sees them: commits what an asset wrote, opens what the next one reads."""

from collections.abc import Sequence
from typing import Protocol

import dagster as dg

from fhir_assets.store.manifest import Manifest
from fhir_assets.store.store import Store


class Update(Protocol):
    """New partitions of one type, written but not yet visible."""

    @property
    def resource_type(self) -> str: ...

    @property
    def manifests(self) -> tuple[Manifest, ...]: ...


class NdjsonIOManager(dg.IOManager):
    """An output is an Update, made visible here; an input is the manifests of the run's partitions, in order."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def handle_output(self, context: dg.OutputContext, obj: Update) -> None:
        """Commit the manifests, each in one step."""
        self._store.commit(obj.manifests)
        context.add_output_metadata(
            {
                "partitions_written": len(obj.manifests),
                "rows": sum(manifest.rows for manifest in obj.manifests),
                "bytes": sum(manifest.bytes for manifest in obj.manifests),
                "stored_bytes": sum(manifest.stored_bytes for manifest in obj.manifests),
            }
        )

    def load_input(self, context: dg.InputContext) -> Sequence[Manifest]:
        """The manifests of the run's partitions; one that was never written has none."""
        layer, key = context.asset_key.path
        return self._store.manifests(layer, key, context.asset_partition_keys)
