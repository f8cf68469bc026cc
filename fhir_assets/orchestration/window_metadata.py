"""Metadata of a materialization by window, so that plots over the partitions of an asset show each window's own counts.

Metadata of an output is the same for all windows of a run; its names begin with ``run_``.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from fhir_assets.orchestration.dagster_internals import AssetMetadataHandle, OutputMetadataAccumulator

PARTITION_ROW_COUNT = "dagster/partition_row_count"


def add_window_metadata(
    step: Any, asset_key: dg.AssetKey, metadata_by_partition: Mapping[str, Mapping[str, Any]]
) -> None:
    """Add metadata to the materializations of an asset that a step will emit, by partition key.

    ``step`` is the context of the step's execution. All windows are added at once, because
    ``context.add_asset_metadata`` adds one and copies the metadata of all others each time.
    """
    metadata = dict(step._metadata_accumulator.per_output_metadata)
    for key, added in metadata_by_partition.items():
        handle = AssetMetadataHandle(asset_key=asset_key, partition_key=key)
        metadata[handle] = {**metadata.get(handle, {}), **added}
    step._metadata_accumulator = OutputMetadataAccumulator(per_output_metadata=metadata)
