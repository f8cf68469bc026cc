"""Jobs."""

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from fhir_assets.assets.run import REFRESH_TAG
from fhir_assets.pipeline.plan import Refresh

INCREMENTAL_LOAD = "incremental_load"
LAYERS = ("raw", "validated", "normalized")


def incremental_load() -> UnresolvedAssetJobDefinition:
    """All layers of a window, or of a range of windows, in one run and one process: what is there is left alone."""
    return dg.define_asset_job(
        INCREMENTAL_LOAD,
        selection=dg.AssetSelection.key_prefixes(*([layer] for layer in LAYERS)),
        executor_def=dg.in_process_executor,
        tags={REFRESH_TAG: Refresh.MISSING.value},
        description="Fetch, validate and load what the windows lack.",
    )
