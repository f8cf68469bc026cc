"""The assets ``validated/<type>``: the resources that pass the rules of FHIR R4, byte for byte.

A resource that fails becomes a dead letter.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from time import perf_counter

import dagster as dg

from fhir_assets.catalog import BY_NAME, ResourceType
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ServerRefused
from fhir_assets.fhir.validation import Validator
from fhir_assets.orchestration.asset_attributes import build_asset_attributes, build_documentation, build_place
from fhir_assets.orchestration.failures import record_step
from fhir_assets.orchestration.loads import build_validate_step
from fhir_assets.orchestration.run_context import RunContext, step_tags
from fhir_assets.orchestration.step_log import describe_counts, describe_rules, log_line
from fhir_assets.orchestration.window_metadata import add_window_metadata
from fhir_assets.pipeline.lost_manifests import require_manifests
from fhir_assets.pipeline.replay.validate_step import ReplayValidateStep, find_outdated_partitions
from fhir_assets.pipeline.sources.binding import SourceBinding
from fhir_assets.pipeline.validate.step import ValidatedUpdate, ValidateStep
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.settings import Settings
from fhir_assets.storage.manifest import Manifest
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import runs


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
        ins={"raw": dg.AssetIn(key=["raw", resource_type.key], input_manager_key="ndjson")},
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
        raw: Sequence[Manifest],
        store: dg.ResourceParam[Store],
        validator: dg.ResourceParam[Validator],
        warehouse: dg.ResourceParam[Warehouse],
        workers: dg.ResourceParam[WorkerPool],
        binding: dg.ResourceParam[SourceBinding],
    ) -> Iterator[dg.Output[ValidatedUpdate]]:
        run = RunContext.from_context(context, settings.window_scheme)
        started = perf_counter()
        with warehouse.connect() as conn:
            refusal = runs.find_failure(conn, run.run_id, name)
        with record_step(run, warehouse, [name], check=binding.require):
            if refusal:
                raise ServerRefused(refusal)
            with warehouse.connect() as conn:
                require_manifests(conn, store, run.run_id, "raw", name, run.partition_keys, raw)
            step = build_validate_step(store, warehouse, workers, validator, run)
            if run.replay:
                update, counts = _replay(run, store, validator, warehouse, step, name, raw)
            else:
                update = step.run(name, run.partition_keys)
                counts = _counts(update)
            with warehouse.connect() as conn:
                runs.record_counts(conn, run.run_id, name, counts)
            _log_validation(context, name, counts, perf_counter() - started, _sum_dead(update))
            metadata = _metadata(update, perf_counter() - started)
            window_counts = {
                manifest.partition_key: {"valid": manifest.rows, "dead": sum(manifest.validated.dead.values())}
                for manifest in update.manifests
                if manifest.validated
            }
            add_window_metadata(
                context.op_execution_context.get_step_execution_context(),
                context.asset_key,
                {key: {**window_counts.get(key, {}), **metadata} for key in run.partition_keys},
            )
            yield dg.Output(update)

    return validated


def _replay(
    run: RunContext,
    store: Store,
    validator: Validator,
    warehouse: Warehouse,
    step: ValidateStep,
    name: str,
    raw: Sequence[Manifest],
) -> tuple[ValidatedUpdate, dict[str, dict[str, int | None]]]:
    """Validate dead letters again.

    Partitions whose counts do not match raw or their dead letters are validated completely.
    """
    replay = ReplayValidateStep(
        store,
        validator,
        warehouse.connect,
        run_id=run.run_id,
        now=run.now,
        also_open=run.replay == "open",
    )
    with warehouse.connect() as conn:
        outdated = find_outdated_partitions(conn, store, name, raw)
    update = step.run(name, outdated, revalidated=outdated)
    replayed = replay.run(name, sorted({manifest.partition_key for manifest in raw}.difference(outdated)))
    counts = _counts(update)
    for manifest in replayed.update.manifests:
        key = manifest.partition_key
        counts[key] = {"valid": replayed.resolved[key], "dead": replayed.failed[key]}
    manifests = update.manifests + replayed.update.manifests
    base_manifests = {**update.base_manifests, **replayed.update.base_manifests}
    return ValidatedUpdate(name, manifests, base_manifests, resolution=update.resolution), counts


def _counts(update: ValidatedUpdate) -> dict[str, dict[str, int | None]]:
    return {key: {"valid": counts.valid, "dead": counts.dead} for key, counts in update.counts.items()}


def _log_validation(
    context: dg.AssetExecutionContext,
    resource_type: str,
    counts: Mapping[str, Mapping[str, int | None]],
    seconds: float,
    dead_by_rule: Mapping[str, int],
) -> None:
    totals = {key: sum(count[key] or 0 for count in counts.values()) for key in ("valid", "dead")}
    if any(totals.values()):
        shown = {"valid": totals["valid"], "dead letters": totals["dead"]}
        log_line(context, describe_counts(resource_type, shown, seconds))
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
