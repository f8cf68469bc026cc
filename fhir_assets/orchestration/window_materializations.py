"""The materializations of an output for all windows of a run, logged as one event that the event log expands.

Dagster builds, logs and packs an event for each asset and window: 4,900 for 91 days of five types, which took a fifth
of the CPU of such a load.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import dagster as dg

from fhir_assets.orchestration.dagster_internals import (
    EXTERNALLY_MANAGED_ASSETS_TAG,
    AssetExecutionType,
    build_output_events,
)


@runtime_checkable
class ExpandingEventLog(Protocol):
    """An event log that stores one event as the materializations of many partitions."""

    def expand_materialization(
        self, run_id: str, asset_key: dg.AssetKey, metadata_by_partition: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Store the next materialization of an asset in a run once for each partition, with the metadata of each."""


def log_window_materializations(context: dg.OutputContext) -> None:
    """Log the materializations of an output, if the run has several windows and the event log can expand them.

    An IO manager calls it at the end of ``handle_output`` of each output, after it has added the metadata. Otherwise,
    and if the assets of the step have different IO managers, Dagster logs the materializations after ``handle_output``.
    """
    step, keys = context.step_context, context.asset_partition_keys
    log = step.instance.event_log_storage
    if len(keys) < 2 or not isinstance(log, ExpandingEventLog) or len(_list_io_managers(step)) > 1:
        return
    asset_key = context.asset_key
    of_output = {**(context.output_metadata or {}), **context.get_logged_metadata()}
    common = {**of_output, **(step.get_asset_metadata(asset_key) or {})}
    metadata = {key: {**common, **(step.get_asset_metadata(asset_key, partition_key=key) or {})} for key in keys}
    (event,) = build_output_events(
        asset_key,
        keys[-1:],
        dg.Output(None, output_name=context.name),
        step.op_def.output_def_named(context.name),
        of_output,
        step,
        AssetExecutionType.MATERIALIZATION,
    )
    log.expand_materialization(step.run_id, asset_key, metadata)
    assert isinstance(event, dg.AssetMaterialization)
    dg.DagsterEvent.asset_materialization(step, event)
    _leave_out_further_events(step)


def _list_io_managers(step: Any) -> set[str]:
    """Return the keys of the IO managers of the assets of a step."""
    assets = step.job_def.asset_layer.get_assets_def_for_node(step.node_handle)
    return {step.op_def.output_def_named(name).io_manager_key for name in assets.node_keys_by_output_name}


def _leave_out_further_events(step: Any) -> None:
    """Make Dagster log no materializations of this step's outputs. The run itself does not get the tag."""
    run = step.dagster_run
    if EXTERNALLY_MANAGED_ASSETS_TAG not in run.tags:
        tagged = run.with_tags({**run.tags, EXTERNALLY_MANAGED_ASSETS_TAG: "true"})
        step._plan_data = step._plan_data._replace(dagster_run=tagged)
