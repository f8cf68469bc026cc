"""The names of all jobs, and the jobs that materialize or check assets.

Jobs made of ops, which materialize no asset, are in ``op_jobs.py``.
"""

from collections.abc import Sequence

import dagster as dg

from fhir_assets.orchestration.dagster_internals import UnresolvedAssetJobDefinition
from fhir_assets.orchestration.tags import REFRESH_TAG, REPLAY_TAG
from fhir_assets.pipeline.refresh import Refresh

INCREMENTAL_LOAD = "incremental_load"
BACKFILL = "backfill"
REPLAY_DEAD_LETTERS = "replay_dead_letters"
REQUEST_REPLAY = "request_replay"
CHECK_TABLES = "check_tables"
LOAD_RECEIVED = "load_received"
LOAD_LANDING = "load_landing"
FETCH_MISSING_REFERENCES = "fetch_missing_references"
APPLY_CONSENT = "apply_consent"

LOADS = (INCREMENTAL_LOAD, BACKFILL, LOAD_RECEIVED, REPLAY_DEAD_LETTERS, FETCH_MISSING_REFERENCES)
"""The jobs that load resources. The ``fhir-assets`` command may execute all but BACKFILL in its own process."""

MISSING_REFERENCES = dg.AssetKey(["missing_references"])
"""The asset that the job ``backfill`` materializes after the layers."""

LAYERS = ("raw", "validated", "normalized")
"""The key prefixes of the three layers, in load order."""


def build_incremental_load(
    table_checks: Sequence[dg.AssetChecksDefinition], written: Sequence[dg.AssetKey] = ()
) -> UnresolvedAssetJobDefinition:
    """Return the job that fetches, validates and loads the missing resources of its windows, in one process.

    The job evaluates the checks of the windows, but not ``table_checks``. It also materializes the ``written`` assets,
    downstream of the three layers: deliveries and exports.
    """
    return dg.define_asset_job(
        INCREMENTAL_LOAD,
        selection=_select_layers(LAYERS, table_checks, written),
        executor_def=dg.in_process_executor,
        tags={REFRESH_TAG: Refresh.MISSING.value},
        description="Fetch, validate and load the missing resources of the windows.",
    )


def build_backfill(
    table_checks: Sequence[dg.AssetChecksDefinition],
    written: Sequence[dg.AssetKey] = (),
) -> UnresolvedAssetJobDefinition:
    """Return the job that does what ``incremental_load`` does, with ``missing_references`` after the layers.

    The ``written`` assets are last. They depend on ``missing_references``.
    """
    return dg.define_asset_job(
        BACKFILL,
        selection=_select_layers(LAYERS, table_checks, [MISSING_REFERENCES, *written]),
        executor_def=dg.in_process_executor,
        tags={REFRESH_TAG: Refresh.MISSING.value},
        description="Fetch, validate and load the missing resources of the windows. Then fetch and load the resources "
        "to which loaded resources refer and that are not loaded, Patients first.",
    )


def build_load_received(
    table_checks: Sequence[dg.AssetChecksDefinition], written: Sequence[dg.AssetKey] = ()
) -> UnresolvedAssetJobDefinition:
    """Return the job that validates and loads resources that arrived in raw without a fetch. It fetches nothing."""
    return dg.define_asset_job(
        LOAD_RECEIVED,
        selection=_select_layers(LAYERS[1:], table_checks, written),
        executor_def=dg.in_process_executor,
        tags={REFRESH_TAG: Refresh.MISSING.value},
        description="Validate and load resources that did not come from the source: landing files, the HTTP API, the "
        "CSV intake, missing references and corrections.",
    )


def build_replay_dead_letters(
    table_checks: Sequence[dg.AssetChecksDefinition], written: Sequence[dg.AssetKey] = ()
) -> UnresolvedAssetJobDefinition:
    """Return the job that validates and loads the dead letters of its windows again, in one process.

    A run launched in the UI replays all open dead letters of its windows. The sensor and the command line set the tag
    ``fhir_assets/replay`` to replay only the marked ones.
    """
    return dg.define_asset_job(
        REPLAY_DEAD_LETTERS,
        selection=_select_layers(LAYERS[1:], table_checks, written),
        executor_def=dg.in_process_executor,
        tags={REFRESH_TAG: Refresh.MISSING.value, REPLAY_TAG: "open"},
        description="Validate the dead letters of the windows again, and load those that are valid now.",
    )


def build_check_tables(table_checks: Sequence[dg.AssetChecksDefinition]) -> UnresolvedAssetJobDefinition:
    """Return the job that evaluates ``table_checks``, in one process."""
    return dg.define_asset_job(
        CHECK_TABLES,
        selection=_select_checks(table_checks),
        executor_def=dg.in_process_executor,
        description="Check that the tables are up to date, have the columns of their views, contain no duplicates, and "
        "that their references resolve.",
    )


def _select_layers(
    layers: Sequence[str], table_checks: Sequence[dg.AssetChecksDefinition], written: Sequence[dg.AssetKey]
) -> dg.AssetSelection:
    loaded = dg.AssetSelection.key_prefixes(*([layer] for layer in layers)) - _select_checks(table_checks)
    return loaded | dg.AssetSelection.assets(*written) if written else loaded


def _select_checks(definitions: Sequence[dg.AssetChecksDefinition]) -> dg.AssetSelection:
    return dg.AssetSelection.checks(*(key for definition in definitions for key in definition.check_keys))
