"""The assets ``raw/<type>``: resources of the source, byte for byte as received."""

from collections.abc import Iterator, Sequence

import dagster as dg

from fhir_assets.catalog import BY_KEY, BY_NAME, ResourceType
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.asset_attributes import build_asset_attributes, build_documentation, build_place
from fhir_assets.orchestration.failures import record_unreported, sanitized_errors
from fhir_assets.orchestration.run_context import read_run_context, step_tags
from fhir_assets.orchestration.step_log import describe_counts, log_line
from fhir_assets.orchestration.tags import FHIR_SERVER_POOL
from fhir_assets.orchestration.window_metadata import add_window_metadata
from fhir_assets.settings import Settings
from fhir_assets.steps.layers import FetchedType, LayerSteps
from fhir_assets.storage.manifest import Fetch


def build_raw_assets(
    settings: Settings,
    partitions: dg.PartitionsDefinition[str],
    *,
    one_pass: bool,
    store_url: str,
) -> list[dg.AssetsDefinition]:
    """Return the raw layer: one step for each resource type, or one step for all of them with ``one_pass``.

    ``one_pass`` is for sources that return all types in one pass: files and bulk exports. ``store_url`` is the address
    of the store, for the catalog.
    """
    types = [BY_NAME[name] for name in settings.fhir_resource_types]
    groups = [types] if one_pass else [[resource_type] for resource_type in types]
    return [_build_raw_step(settings, partitions, group, store_url) for group in groups]


def _build_raw_step(
    settings: Settings,
    partitions: dg.PartitionsDefinition[str],
    types: Sequence[ResourceType],
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
        steps: dg.ResourceParam[LayerSteps],
        warehouse: dg.ResourceParam[Warehouse],
    ) -> Iterator[dg.Output[FetchedType]]:
        run = read_run_context(context, settings.window_scheme)
        names = {BY_KEY[key].name for key in context.op_execution_context.selected_output_names}
        selected = [t.name for t in types if t.name in names]

        def show(text: str) -> None:
            # An observation, because the command line prints only those of a run in its own process.
            context.log_event(dg.AssetObservation(["raw", types[0].key], description=text))

        with sanitized_errors():
            fetched = steps.fetch(run, selected, show)
        with record_unreported(run, warehouse, selected):
            for name in selected:
                if not fetched[name].is_offered:
                    log_line(context, f"{name} is skipped: the source does not offer it")
            for name in selected:
                _log_fetch(context, fetched[name])
                metadata = _metadata(fetched[name])
                fetches = fetched[name].update.fetches
                add_window_metadata(
                    context.op_execution_context.get_step_execution_context(),
                    dg.AssetKey(["raw", BY_NAME[name].key]),
                    {key: {**_window_metadata(fetches.get(key)), **metadata} for key in run.partition_keys},
                )
                yield dg.Output(fetched[name], output_name=BY_NAME[name].key)

    return raw


def _log_fetch(context: dg.AssetExecutionContext, fetched: FetchedType) -> None:
    update = fetched.update
    fetches = update.fetches.values()
    counts = {
        "fetched": sum(fetch.matched for fetch in fetches),
        "repeated": sum(fetch.repeated for fetch in fetches),
        "rejected": sum(fetch.rejected for fetch in fetches),
        "older than FHIR_LAST_UPDATED_GTE": update.before_first_window,
    }
    if any(counts.values()):
        log_line(context, describe_counts(update.resource_type, counts, fetched.seconds))
    for notice in update.notices:
        log_line(context, f"{notice.severity}: {notice.message}")


def _window_metadata(fetch: Fetch | None) -> dict[str, int | str]:
    if fetch is None:
        return {}
    return {"fetched": fetch.matched, "server_total": _describe_total(fetch.server_total), "dead": fetch.dead}


def _metadata(fetched: FetchedType) -> dict[str, int | float | str]:
    """Return the metadata of the run, which is the same for all of its windows."""
    update, seconds = fetched.update, fetched.seconds
    fetches = update.fetches.values()
    matched = sum(fetch.matched for fetch in fetches)
    metadata: dict[str, int | float | str] = {
        "run_fetched": matched,
        "run_repeated": sum(fetch.repeated for fetch in fetches),
        "run_dead_letters": sum(fetch.rejected for fetch in fetches),
        "run_seconds": round(seconds, 3),
        "run_rows_per_second": round(matched / seconds) if seconds else 0,
    }
    if update.notices:
        metadata["notices"] = "; ".join(notice.message for notice in update.notices)
    if update.before_first_window:
        metadata["older_than_FHIR_LAST_UPDATED_GTE"] = update.before_first_window
    if fetched.deleted is not None:
        metadata["run_deleted"] = fetched.deleted
    if not fetched.is_offered:
        metadata["skipped"] = "the source does not offer this type"
    return metadata


def _describe_total(total: int | None) -> int | str:
    return "the source reports no total" if total is None else total
