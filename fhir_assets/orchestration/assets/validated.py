"""``validated/<type>``: the resources that keep R4's rules, byte for byte; the others are dead letters."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from time import perf_counter

import dagster as dg

from fhir_assets.catalog import BY_NAME, ResourceType
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.validation import Validator
from fhir_assets.orchestration.run_context import RunContext, recorded, step_tags
from fhir_assets.pipeline.replay.validate_step import ReplayValidateStep
from fhir_assets.pipeline.validate.step import ValidatedUpdate, ValidateStep
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.settings import Settings
from fhir_assets.storage.manifest import Manifest
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import dead_letters, runs


def validated_assets(settings: Settings, partitions: dg.PartitionsDefinition[str]) -> list[dg.AssetsDefinition]:
    """The validated layer: an asset a type."""
    return [_validated(settings, partitions, BY_NAME[name]) for name in settings.fhir_resource_types]


def _validated(
    settings: Settings, partitions: dg.PartitionsDefinition[str], resource_type: ResourceType
) -> dg.AssetsDefinition:
    name = resource_type.name

    @dg.asset(
        name=resource_type.key,
        key_prefix="validated",
        group_name=resource_type.group,
        ins={"raw": dg.AssetIn(key=["raw", resource_type.key], input_manager_key="ndjson")},
        io_manager_key="ndjson",
        partitions_def=partitions,
        backfill_policy=dg.BackfillPolicy.multi_run(settings.fhir_windows_per_run),
        description=f"{name} resources that keep every rule of R4; the others are in ops.dead_letters.",
        kinds={"fhir", "json"},
        op_tags=step_tags([name]),
    )
    def validated(
        context: dg.AssetExecutionContext,
        raw: Sequence[Manifest],
        store: dg.ResourceParam[Store],
        validator: dg.ResourceParam[Validator],
        warehouse: dg.ResourceParam[Warehouse],
        workers: dg.ResourceParam[WorkerPool],
    ) -> Iterator[dg.Output[ValidatedUpdate]]:
        facts = RunContext.of(context, settings.window_scheme)
        started = perf_counter()
        with recorded(facts, warehouse, [name]):
            validation = ValidateStep(
                store,
                validator,
                warehouse.connect,
                run_id=facts.run_id,
                now=facts.now,
                refresh=facts.refresh,
                workers=workers,
            )
            if facts.replay:
                update, counts = _replay(facts, store, validator, warehouse, validation, name, raw)
            else:
                update = validation.run(name, raw)
                counts = _counts(update)
            with warehouse.connect() as conn:
                dead_letters.settle(conn, facts.run_id, name, "validate", update.revalidated_keys)
                runs.count(conn, facts.run_id, name, counts)
            for manifest in update.manifests:
                if manifest.validated:
                    context.add_asset_metadata(
                        {"window_valid": manifest.rows, "window_dead": sum(manifest.validated.dead.values())},
                        partition_key=manifest.partition_key,
                    )
            yield dg.Output(update, metadata=_metadata(update, perf_counter() - started))

    return validated


def _replay(
    facts: RunContext,
    store: Store,
    validator: Validator,
    warehouse: Warehouse,
    validation: ValidateStep,
    name: str,
    raw: Sequence[Manifest],
) -> tuple[ValidatedUpdate, dict[str, dict[str, int | None]]]:
    """Judge dead letters again; a partition that is behind its raw one is judged as in any load instead."""
    replay = ReplayValidateStep(
        store,
        validator,
        warehouse.connect,
        run_id=facts.run_id,
        now=facts.now,
        also_open=facts.replay == "open",
    )
    behind = replay.behind(name, raw)
    update = validation.run(name, behind)
    found = replay.run(name, sorted({m.partition_key for m in raw}.difference(m.partition_key for m in behind)))
    counts = _counts(update)
    for manifest in found.update.manifests:
        key = manifest.partition_key
        counts[key] = {"valid": found.resolved[key], "dead": found.failed[key]}
    manifests = update.manifests + found.update.manifests
    return ValidatedUpdate(name, manifests, update.revalidated_keys, {**update.bases, **found.update.bases}), counts


def _counts(update: ValidatedUpdate) -> dict[str, dict[str, int | None]]:
    return {
        manifest.partition_key: {"valid": manifest.rows, "dead": sum(manifest.validated.dead.values())}
        for manifest in update.manifests
        if manifest.validated
    }


def _metadata(update: ValidatedUpdate, seconds: float) -> dict[str, dg.MetadataValue]:
    judged = [manifest.validated for manifest in update.manifests if manifest.validated]
    rows = sum(state.rows_in for state in judged)
    dead = _sum(state.dead for state in judged)
    return {
        "judged": dg.IntMetadataValue(rows),
        "dead_letters": dg.IntMetadataValue(sum(dead.values())),
        "dead_letters_by_rule": dg.JsonMetadataValue(dead),
        "warnings_by_rule": dg.JsonMetadataValue(_sum(state.warnings for state in judged)),
        "seconds": dg.FloatMetadataValue(round(seconds, 3)),
        "rows_per_second": dg.IntMetadataValue(round(rows / seconds) if seconds else 0),
    }


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total.most_common())
