"""The assets ``raw/<type>``: resources of the source, byte for byte as received."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from time import perf_counter

import dagster as dg

from fhir_assets.catalog import BY_KEY, BY_NAME, ResourceType
from fhir_assets.deployment.source import open_existence_reader, open_history
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.source import Source
from fhir_assets.notices import Notice
from fhir_assets.orchestration.asset_attributes import build_asset_attributes, build_documentation, build_place
from fhir_assets.orchestration.failures import record_step
from fhir_assets.orchestration.progress import ProgressRelay
from fhir_assets.orchestration.run_context import RunContext, step_tags
from fhir_assets.orchestration.step_log import describe_counts, log_line
from fhir_assets.orchestration.tags import FHIR_SERVER_POOL
from fhir_assets.orchestration.window_metadata import add_window_metadata
from fhir_assets.pipeline.deletions.deletion_log import DeletionLog
from fhir_assets.pipeline.deletions.server_history import apply_server_deletions
from fhir_assets.pipeline.fetch.step import FetchStep, RawUpdate
from fhir_assets.pipeline.fetch.vanished import VanishedStep
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.sources.binding import SourceBinding
from fhir_assets.settings import Settings
from fhir_assets.storage.manifest import Fetch
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import dead_letter_resolution, dead_letters, runs

_log = logging.getLogger(__name__)


def build_raw_assets(
    settings: Settings,
    partitions: dg.PartitionsDefinition[str],
    *,
    one_pass: bool,
    progress: ProgressRelay,
    store_url: str,
) -> list[dg.AssetsDefinition]:
    """Return the raw layer: one step for each resource type, or one step for all of them with ``one_pass``.

    ``one_pass`` is for sources that return all types in one pass: files and bulk exports. ``store_url`` is the address
    of the store, for the catalog.
    """
    types = [BY_NAME[name] for name in settings.fhir_resource_types]
    groups = [types] if one_pass else [[resource_type] for resource_type in types]
    return [_build_raw_step(settings, partitions, group, progress, store_url) for group in groups]


def _build_raw_step(
    settings: Settings,
    partitions: dg.PartitionsDefinition[str],
    types: Sequence[ResourceType],
    progress: ProgressRelay,
    store_url: str,
) -> dg.AssetsDefinition:
    @dg.multi_asset(
        name=f"raw__{types[0].key}" if len(types) == 1 else "raw",
        description=f"Fetch {types[0].name if len(types) == 1 else 'all'} resources of the windows from the source.",
        outs={
            t.key: dg.AssetOut(
                key=["raw", t.key],
                io_manager_key="ndjson",
                is_required=False,
                description=f"{t.name} resources, byte for byte as received from the source, one in each line.",
                metadata={**build_place(store_url, "raw", t), **build_documentation(t)},
                **build_asset_attributes(t, "raw", "json", owners=settings.fhir_owners, phi=bool(t.patient)),
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
        binding: dg.ResourceParam[SourceBinding],
    ) -> Iterator[dg.Output[RawUpdate]]:
        run = RunContext.from_context(context, settings.window_scheme)
        names = {BY_KEY[key].name for key in context.op_execution_context.selected_output_names}
        selected = [t.name for t in types if t.name in names]
        started = perf_counter()
        with record_step(run, warehouse, selected, check=partial(binding.require, fetches=True)):
            offered = source.list_types()
            for name in selected:
                if offered is not None and name not in offered:
                    log_line(context, f"{name} is skipped: the source does not offer it")
            available = [name for name in selected if offered is None or name in offered]
            step = FetchStep(
                source,
                store,
                run_id=run.run_id,
                now=run.now,
                overlap=settings.overlap,
                refresh=run.refresh,
                write_dead_letters=lambda rejected: dead_letters.record_now(warehouse.connect, run.run_id, rejected),
                recorded_before=dead_letter_resolution.next_record_number(warehouse.connect),
            )
            # The progress of an export is logged as observations, because the command line prints only those.
            with progress.send_to(
                lambda text: context.log_event(dg.AssetObservation(["raw", types[0].key], description=text))
            ):
                updates = {update.resource_type: update for update in step.run(available, run.windows)}
            updates, deleted = _apply_deletions(settings, warehouse, store, run, available, updates)
            seconds = perf_counter() - started
            for name in selected:
                update = updates.get(name) or RawUpdate(name, (), {})
                _log_fetch(context, update, seconds)
                for notice in update.notices:
                    _log.warning(notice.message, extra={"resource_type": name, "notice": notice.code})
                metadata = _metadata(update, seconds, skipped=name not in available, deleted=deleted.get(name))
                add_window_metadata(
                    context.op_execution_context.get_step_execution_context(),
                    dg.AssetKey(["raw", BY_NAME[name].key]),
                    {key: {**_window_metadata(update.fetches.get(key)), **metadata} for key in run.partition_keys},
                )
                yield dg.Output(update, output_name=BY_NAME[name].key)
                with warehouse.connect() as conn:
                    if update.refusal:
                        # This step continues with the other types; the step that validates this type fails.
                        share = seconds / len(selected)
                        runs.fail(conn, run.run_id, [name], run.partition_keys, error=update.refusal, seconds=share)
                    runs.record_counts(
                        conn,
                        run.run_id,
                        name,
                        {
                            key: {
                                "server_total": fetch.server_total,
                                "fetched": fetch.new,
                                "dead": fetch.dead,
                            }
                            for key, fetch in update.fetches.items()
                        },
                    )
                    if update.before_first_window:
                        runs.record_older(conn, run.run_id, name, run.partition_keys[0], update.before_first_window)

    return raw


def _apply_deletions(
    settings: Settings,
    warehouse: Warehouse,
    store: Store,
    run: RunContext,
    resource_types: Sequence[str],
    updates: Mapping[str, RawUpdate],
) -> tuple[dict[str, RawUpdate], dict[str, int]]:
    """Delete resources that the source has deleted.

    They are listed in the source's history, or missing in windows that were fetched again. Return the updates with the
    notices of both steps, and the number of deleted resources by type.
    """
    deletion_log = DeletionLog(store, warehouse.connect)
    deleted: dict[str, int] = {}
    notices: tuple[Notice, ...] = ()
    if history := open_history(settings, warehouse):
        deleted = apply_server_deletions(
            warehouse.connect,
            deletion_log,
            history,
            resource_types,
            run_id=run.run_id,
            now=run.now,
            overlap=settings.overlap,
        )
        notices = history.drain_notices()
    reader = open_existence_reader(settings, warehouse)
    if reader and run.refresh is not Refresh.MISSING:
        step = VanishedStep(warehouse.connect, store, deletion_log, reader, run_id=run.run_id)
        for name, update in updates.items():
            deleted[name] = deleted.get(name, 0) + step.run(update)
        notices = (*notices, *reader.drain_notices(), *step.drain_notices())
    return {name: update.add_notices(notices) for name, update in updates.items()}, deleted


def _log_fetch(context: dg.AssetExecutionContext, update: RawUpdate, seconds: float) -> None:
    fetches = update.fetches.values()
    counts = {
        "fetched": sum(fetch.matched for fetch in fetches),
        "repeated": sum(fetch.repeated for fetch in fetches),
        "rejected": sum(fetch.rejected for fetch in fetches),
        "older than FHIR_LAST_UPDATED_GTE": update.before_first_window,
    }
    if any(counts.values()):
        log_line(context, describe_counts(update.resource_type, counts, seconds))
    for notice in update.notices:
        log_line(context, f"{notice.severity}: {notice.message}")


def _window_metadata(fetch: Fetch | None) -> dict[str, int | str]:
    if fetch is None:
        return {}
    return {"fetched": fetch.matched, "server_total": _describe_total(fetch.server_total), "dead": fetch.dead}


def _metadata(update: RawUpdate, seconds: float, *, skipped: bool, deleted: int | None) -> dict[str, int | float | str]:
    """Return the metadata of the run, which is the same for all of its windows."""
    fetches = update.fetches.values()
    fetched = sum(fetch.matched for fetch in fetches)
    metadata: dict[str, int | float | str] = {
        "run_fetched": fetched,
        "run_repeated": sum(fetch.repeated for fetch in fetches),
        "run_dead_letters": sum(fetch.rejected for fetch in fetches),
        "run_seconds": round(seconds, 3),
        "run_rows_per_second": round(fetched / seconds) if seconds else 0,
    }
    if update.notices:
        metadata["notices"] = "; ".join(notice.message for notice in update.notices)
    if update.before_first_window:
        metadata["older_than_FHIR_LAST_UPDATED_GTE"] = update.before_first_window
    if deleted is not None:
        metadata["run_deleted"] = deleted
    if skipped:
        metadata["skipped"] = "the source does not offer this type"
    return metadata


def _describe_total(total: int | None) -> int | str:
    return "the source reports no total" if total is None else total
