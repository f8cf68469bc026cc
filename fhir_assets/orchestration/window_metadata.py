"""Metadata of a materialization by window, so that plots over partitions show each window's own counts.

Metadata of an output is the same for all windows of a run; its names begin with ``run_``. Only materializations of runs
of one window contain it.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from fhir_assets.orchestration.dagster_internals import AssetMetadataHandle, OutputMetadataAccumulator

PARTITION_ROW_COUNT = "dagster/partition_row_count"
ROW_COUNT = "dagster/row_count"
RUN_PREFIX = "run_"


def add_window_metadata(
    step: Any, asset_key: dg.AssetKey, metadata_by_partition: Mapping[str, Mapping[str, Any]]
) -> None:
    """Add metadata to the materializations of an asset that a step will emit, by partition key.

    Entries of the whole run (``run_…``) are left out if there are several windows: they would be the same for each, and
    the log of the run contains them. ``step`` is the context of the step's execution. All windows are added at once,
    because ``context.add_asset_metadata`` adds one and copies the metadata of all others each time.
    """
    metadata = dict(step._metadata_accumulator.per_output_metadata)
    several = len(metadata_by_partition) > 1
    for key, added in metadata_by_partition.items():
        handle = AssetMetadataHandle(asset_key=asset_key, partition_key=key)
        shown = {name: value for name, value in added.items() if not (several and name.startswith(RUN_PREFIX))}
        metadata[handle] = {**metadata.get(handle, {}), **shown}
    step._metadata_accumulator = OutputMetadataAccumulator(per_output_metadata=metadata)
