"""``raw/<type>``: resources as the source gave them."""

from collections.abc import Iterator, Sequence
from time import perf_counter

import dagster as dg

from fhir_assets.catalog import BY_KEY, BY_NAME, ResourceType
from fhir_assets.deployment.source import open_history
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.source import Source
from fhir_assets.orchestration.progress import ProgressRelay
from fhir_assets.orchestration.run_context import RunContext, recorded, step_tags
from fhir_assets.orchestration.tags import FHIR_SERVER_POOL
from fhir_assets.pipeline.deletions.deletion_log import DeletionLog
from fhir_assets.pipeline.deletions.server_history import apply_server_deletions
from fhir_assets.pipeline.fetch.step import FetchStep, RawUpdate
from fhir_assets.settings import Settings
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import dead_letters, runs


def raw_assets(
    settings: Settings, partitions: dg.PartitionsDefinition[str], *, one_pass: bool, progress: ProgressRelay
) -> list[dg.AssetsDefinition]:
    """The raw layer: a step a type, or a single step where the source gives all types in one pass."""
    types = [BY_NAME[name] for name in settings.fhir_resource_types]
    groups = [types] if one_pass else [[resource_type] for resource_type in types]
    return [_raw(settings, partitions, group, progress) for group in groups]


def _raw(
    settings: Settings,
    partitions: dg.PartitionsDefinition[str],
    types: Sequence[ResourceType],
    progress: ProgressRelay,
) -> dg.AssetsDefinition:
    @dg.multi_asset(
        name=f"raw__{types[0].key}" if len(types) == 1 else "raw",
        outs={
            t.key: dg.AssetOut(
                key=["raw", t.key],
                group_name=t.group,
                io_manager_key="ndjson",
                is_required=False,
                description=f"{t.name} resources as received from the source, one line each, byte for byte.",
                kinds={"fhir", "json"},
            )
            for t in types
        },
        partitions_def=partitions,
        backfill_policy=dg.BackfillPolicy.multi_run(settings.fhir_windows_per_run),
        can_subset=True,
        pool=FHIR_SERVER_POOL,
        op_tags=step_tags([t.name for t in types]),
    )
    def raw(
        context: dg.AssetExecutionContext,
        source: dg.ResourceParam[Source],
        store: dg.ResourceParam[Store],
        warehouse: dg.ResourceParam[Warehouse],
    ) -> Iterator[dg.Output[RawUpdate]]:
        facts = RunContext.of(context, settings.window_scheme)
        wanted = [BY_KEY[name].name for name in sorted(context.op_execution_context.selected_output_names)]
        wanted = [t.name for t in types if t.name in wanted]
        started = perf_counter()
        with recorded(facts, warehouse, wanted):
            offered = source.offered()
            for name in wanted:
                if offered is not None and name not in offered:
                    context.log.info(f"The source does not offer {name}: skipped.")
            here = [name for name in wanted if offered is None or name in offered]
            fetcher = FetchStep(
                source,
                store,
                run_id=facts.run_id,
                now=facts.now,
                overlap=settings.overlap,
                refresh=facts.refresh,
                reject=lambda letters: dead_letters.record_now(warehouse.connect, facts.run_id, letters),
            )
            # dagster.yaml silences Dagster's own logger: the progress of an export appears among the step's events.
            with progress.send_to(
                lambda text: context.log_event(dg.AssetObservation(["raw", types[0].key], description=text))
            ):
                updates = {update.resource_type: update for update in fetcher.run(here, facts.windows)}
            history = open_history(settings, warehouse)
            deleted = (
                apply_server_deletions(
                    warehouse.connect,
                    DeletionLog(store, warehouse.connect),
                    history,
                    here,
                    run_id=facts.run_id,
                    now=facts.now,
                    overlap=settings.overlap,
                )
                if history
                else {}
            )
            seconds = perf_counter() - started
            for name in wanted:
                update = updates.get(name) or RawUpdate(name, (), {})
                for key, fetch in update.fetches.items():
                    context.add_asset_metadata(
                        {"window_fetched": fetch.matched, "window_server_total": _said(fetch.server_total)},
                        asset_key=["raw", BY_NAME[name].key],
                        partition_key=key,
                    )
                yield dg.Output(
                    update,
                    output_name=BY_NAME[name].key,
                    metadata=_metadata(update, seconds, skipped=name not in here)
                    | ({"deleted": deleted[name]} if name in deleted else {}),
                )
                with warehouse.connect() as conn:
                    dead_letters.settle(conn, facts.run_id, name, "fetch", update.refetched_keys)
                    runs.count(
                        conn,
                        facts.run_id,
                        name,
                        {
                            key: {"server_total": fetch.server_total, "fetched": fetch.matched - fetch.repeated}
                            for key, fetch in update.fetches.items()
                        },
                    )

    return raw


def _metadata(update: RawUpdate, seconds: float, *, skipped: bool) -> dict[str, int | float | str]:
    fetches = update.fetches.values()
    fetched = sum(fetch.matched for fetch in fetches)
    metadata: dict[str, int | float | str] = {
        "fetched": fetched,
        "repeated": sum(fetch.repeated for fetch in fetches),
        "dead_letters": sum(fetch.rejected for fetch in fetches),
        "seconds": round(seconds, 3),
        "rows_per_second": round(fetched / seconds) if seconds else 0,
    }
    if update.before_first_window:
        metadata["older_than_FHIR_LAST_UPDATED_GTE"] = update.before_first_window
    if skipped:
        metadata["skipped"] = "the source does not offer this type"
    return metadata


def _said(total: int | None) -> int | str:
    return "the source cannot say" if total is None else total
