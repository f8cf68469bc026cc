"""Jobs."""

from collections.abc import Sequence

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from fhir_assets.orchestration.tags import REFRESH_TAG, REPLAY_TAG
from fhir_assets.pipeline.refresh import Refresh

INCREMENTAL_LOAD = "incremental_load"
REPLAY_DEAD_LETTERS = "replay_dead_letters"
CHECK_TABLES = "check_tables"
LOAD_RECEIVED = "load_received"
FETCH_MISSING_REFERENCES = "fetch_missing_references"
LOADS = (INCREMENTAL_LOAD, LOAD_RECEIVED, REPLAY_DEAD_LETTERS, FETCH_MISSING_REFERENCES)
"""The jobs whose runs `fhir-assets` may also start in its own process."""

LAYERS = ("raw", "validated", "normalized")


def incremental_load(
    table_checks: Sequence[dg.AssetChecksDefinition], delivered: Sequence[dg.AssetKey] = ()
) -> UnresolvedAssetJobDefinition:
    """All layers of a window, or of a range of windows, in one run and one process: what is there is left alone.

    ``table_checks`` are those that a load does not evaluate; ``delivered`` assets follow the layers.
    """
    return dg.define_asset_job(
        INCREMENTAL_LOAD,
        selection=_layers(LAYERS, table_checks, delivered),
        executor_def=dg.in_process_executor,
        tags={REFRESH_TAG: Refresh.MISSING.value},
        description="Fetch, validate and load what the windows lack.",
    )


def load_received(
    table_checks: Sequence[dg.AssetChecksDefinition], delivered: Sequence[dg.AssetKey] = ()
) -> UnresolvedAssetJobDefinition:
    """What was received into the windows by another door than the source: validated and loaded, nothing fetched."""
    return dg.define_asset_job(
        LOAD_RECEIVED,
        selection=_layers(("validated", "normalized"), table_checks, delivered),
        executor_def=dg.in_process_executor,
        tags={REFRESH_TAG: Refresh.MISSING.value},
        description="Validate and load what was received by other doors than the source: landing files, intake.",
    )


def replay_dead_letters(
    table_checks: Sequence[dg.AssetChecksDefinition], delivered: Sequence[dg.AssetKey] = ()
) -> UnresolvedAssetJobDefinition:
    """Dead letters of some windows judged and loaded again, in one run and one process. Launched by hand it takes the
    open ones of the windows; the sensor and the command line ask for those that were marked.
    """
    return dg.define_asset_job(
        REPLAY_DEAD_LETTERS,
        selection=_layers(LAYERS[1:], table_checks, delivered),
        executor_def=dg.in_process_executor,
        tags={REFRESH_TAG: Refresh.MISSING.value, REPLAY_TAG: "open"},
        description="Judge the dead letters of the windows again, and load what healed.",
    )


def check_tables(table_checks: Sequence[dg.AssetChecksDefinition]) -> UnresolvedAssetJobDefinition:
    """The checks of whole tables, in one run and one process."""
    return dg.define_asset_job(
        CHECK_TABLES,
        selection=_checks(table_checks),
        executor_def=dg.in_process_executor,
        description="Are the tables fresh, as their views ask, without duplicates, and do their references resolve?",
    )


def _layers(
    layers: Sequence[str], table_checks: Sequence[dg.AssetChecksDefinition], delivered: Sequence[dg.AssetKey]
) -> dg.AssetSelection:
    loaded = dg.AssetSelection.key_prefixes(*([layer] for layer in layers)) - _checks(table_checks)
    return loaded | dg.AssetSelection.assets(*delivered) if delivered else loaded


def _checks(definitions: Sequence[dg.AssetChecksDefinition]) -> dg.AssetSelection:
    return dg.AssetSelection.checks(*(key for each in definitions for key in each.check_keys))
