"""The assets ``validated/<type>``: the resources that pass the rules of FHIR R4, byte for byte.

A resource that fails becomes a dead letter.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import dagster as dg

from fhir_assets.catalog import BY_NAME, ResourceType
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.asset_attributes import build_asset_attributes, build_documentation, build_place
from fhir_assets.orchestration.failures import record_unreported, sanitized_errors
from fhir_assets.orchestration.run_context import read_run_context, step_tags
from fhir_assets.orchestration.step_log import describe_counts, describe_rules, log_line
from fhir_assets.orchestration.window_metadata import add_window_metadata
from fhir_assets.pipeline.validate.step import ValidatedUpdate
from fhir_assets.settings import Settings
from fhir_assets.steps.layers import LayerSteps, ValidatedType


def build_validated_assets(
    settings: Settings, partitions: dg.PartitionsDefinition[str], *, store_url: str
) -> list[dg.AssetsDefinition]:
    """Return the validated layer: one asset for each resource type. ``store_url`` is named in the catalog."""
    return [
        _build_validated_asset(settings, partitions, BY_NAME[name], store_url) for name in settings.fhir_resource_types
    ]


def _build_validated_asset(
    settings: Settings, partitions: dg.PartitionsDefinition[str], resource_type: ResourceType, store_url: str
) -> dg.AssetsDefinition:
    name = resource_type.name

    @dg.asset(
        name=resource_type.key,
        key_prefix="validated",
        deps=[["raw", resource_type.key]],
        io_manager_key="ndjson",
        partitions_def=partitions,
        backfill_policy=dg.BackfillPolicy.multi_run(settings.fhir_windows_per_run),
        description=f"{name} resources that pass every rule of FHIR R4; the others are in ops.dead_letters.",
        op_tags=step_tags([name]),
        metadata={**build_place(store_url, "validated", resource_type), **build_documentation(resource_type)},
        **build_asset_attributes(
            resource_type, "validated", "json", owners=settings.fhir_owners, phi=bool(resource_type.patient)
        ),
    )
    def validated(
        context: dg.AssetExecutionContext,
        steps: dg.ResourceParam[LayerSteps],
        warehouse: dg.ResourceParam[Warehouse],
    ) -> Iterator[dg.Output[ValidatedType]]:
        run = read_run_context(context, settings.window_scheme)
        with sanitized_errors():
            checked = steps.validate(run, name)
        with record_unreported(run, warehouse, [name]):
            _log_validation(context, name, checked)
            metadata = _metadata(checked.update, checked.seconds)
            window_counts = {
                manifest.partition_key: {"valid": manifest.rows, "dead": sum(manifest.validated.dead.values())}
                for manifest in checked.update.manifests
                if manifest.validated
            }
            add_window_metadata(
                context.op_execution_context.get_step_execution_context(),
                context.asset_key,
                {key: {**window_counts.get(key, {}), **metadata} for key in run.partition_keys},
            )
            yield dg.Output(checked)

    return validated


def _log_validation(context: dg.AssetExecutionContext, resource_type: str, checked: ValidatedType) -> None:
    dead_by_rule = _sum_dead(checked.update)
    totals = {key: sum(count[key] or 0 for count in checked.counts.values()) for key in ("valid", "dead")}
    if any(totals.values()):
        shown = {"valid": totals["valid"], "dead letters": totals["dead"]}
        log_line(context, describe_counts(resource_type, shown, checked.seconds))
    if totals["dead"] and dead_by_rule:
        log_line(context, f"{resource_type}: dead letters of these windows by rule: {describe_rules(dead_by_rule)}")


def _sum_dead(update: ValidatedUpdate) -> dict[str, int]:
    return _sum(manifest.validated.dead for manifest in update.manifests if manifest.validated)


def _metadata(update: ValidatedUpdate, seconds: float) -> dict[str, dg.MetadataValue]:
    """Return the metadata of the run, which is the same for all of its windows."""
    states = [manifest.validated for manifest in update.manifests if manifest.validated]
    rows = sum(state.rows_in for state in states)
    dead = _sum(state.dead for state in states)
    return {
        "run_resources": dg.IntMetadataValue(rows),
        "run_dead_letters": dg.IntMetadataValue(sum(dead.values())),
        "run_dead_letters_by_rule": dg.JsonMetadataValue(dead),
        "run_warnings_by_rule": dg.JsonMetadataValue(_sum(state.warnings for state in states)),
        "run_seconds": dg.FloatMetadataValue(round(seconds, 3)),
        "run_rows_per_second": dg.IntMetadataValue(round(rows / seconds) if seconds else 0),
    }


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total.most_common())
