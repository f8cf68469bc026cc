"""The assets ``exports/<type>``: the windows of a run as files in FHIR_EXPORT_URL.

Each run that loaded resources writes one folder: the resources as received, the valid resources and the dead letters
as NDJSON, and the tables as Parquet. ``ops.held_windows`` lists the windows that were loaded and are in no folder yet,
and those that do not reconcile; the next run includes them once they reconcile.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime

import dagster as dg

from fhir_assets.catalog import BY_NAME, ResourceType
from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.store import build_blobs
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.views import View
from fhir_assets.orchestration.assets.outbound import emit_outbound_results
from fhir_assets.orchestration.failures import record_step, sanitized_errors
from fhir_assets.orchestration.jobs import MISSING_REFERENCES
from fhir_assets.orchestration.run_context import read_run_context
from fhir_assets.pipeline.reconcile.verdicts import OutboundWindows, select_outbound_windows
from fhir_assets.pipeline.reconcile.window_counts import find_main_view
from fhir_assets.settings import Settings
from fhir_assets.steps.consent import apply_consent
from fhir_assets.steps.run_context import RunContext
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.exports.export import Export, ExportedFile, build_run_folder
from fhir_assets.warehouse.ops import held_windows, runs
from fhir_assets.warehouse.postgres.tables import view_tables


def build_export_assets(
    settings: Settings, partitions: dg.PartitionsDefinition[str], views: Sequence[View]
) -> list[dg.AssetsDefinition]:
    """Return an asset for each resource type, or an empty list if FHIR_EXPORT_URL is not set."""
    if not settings.fhir_export_url:
        return []
    return [_build_export_asset(settings, partitions, BY_NAME[name], views) for name in settings.fhir_resource_types]


def _build_export_asset(
    settings: Settings, partitions: dg.PartitionsDefinition[str], resource_type: ResourceType, all_views: Sequence[View]
) -> dg.AssetsDefinition:
    name = resource_type.name
    views = [view for view in all_views if view.resource_type == name]
    destination = held_windows.name_export_destination(settings.fhir_export_url)
    key = dg.AssetKey(["exports", resource_type.key])

    @dg.asset(
        key=key,
        group_name="exports",
        deps=[*(dg.AssetKey(["normalized", view.name]) for view in views), MISSING_REFERENCES],
        partitions_def=partitions,
        output_required=False,
        backfill_policy=dg.BackfillPolicy.multi_run(settings.fhir_windows_per_run),
        description=f"{name}: the windows of a run as NDJSON and Parquet files in FHIR_EXPORT_URL.",
        kinds={"fhir", "parquet"},
    )
    def exports(
        context: dg.AssetExecutionContext, store: dg.ResourceParam[Store], warehouse: dg.ResourceParam[Warehouse]
    ) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
        run = read_run_context(context, settings.window_scheme)
        with sanitized_errors(), warehouse.connect() as conn:
            loaded = runs.find_loaded_windows(conn, run.run_id, name, run.partition_keys)
            waiting = held_windows.find_held(conn, destination, name)
        if loaded is None and MISSING_REFERENCES in context.job_def.asset_layer.selected_asset_keys:
            # A run that loads missing references writes the types that it loaded, and selects all types.
            loaded = []
        if loaded is not None and not loaded and not waiting:
            # The run found nothing new for the type. The materialization states that its windows need no export, and
            # ends the incident of an earlier run that failed.
            yield dg.MaterializeResult(asset_key=key, metadata={"files": 0, "rows": 0})
            return
        keys = run.partition_keys if loaded is None else loaded
        # A run that only exports is no load, so it has no row in ops.ingestion_runs.
        recording: AbstractContextManager[None] = (
            sanitized_errors() if loaded is None else record_step(run, warehouse, [name])
        )
        start = context.instance.get_run_stats(run.run_id).start_time
        folder = build_run_folder(run.run_id, datetime.fromtimestamp(start or run.now.timestamp(), UTC))
        with recording:
            apply_consent(settings, warehouse, all_views, run)
            written = _write_folder(settings, store, warehouse, run, name, views, keys, folder=folder)
        metadata: dict[str, object] = {
            "rows": sum(file.rows for file in written.files),
            "bytes": sum(file.bytes for file in written.files),
            "files": len(written.files),
        }
        if written.folder:
            metadata["folder"] = dg.MetadataValue.path(written.folder)
        outbound = written.outbound
        yield from emit_outbound_results(context, key, outbound.held, metadata, released=outbound.released)

    return exports


@dataclass(frozen=True, slots=True)
class _Written:
    """The files of one type. ``folder`` is empty if there was no window to write."""

    folder: str
    files: Sequence[ExportedFile]
    outbound: OutboundWindows


def _write_folder(
    settings: Settings,
    store: Store,
    warehouse: Warehouse,
    run: RunContext,
    name: str,
    views: Sequence[View],
    partition_keys: Sequence[str],
    *,
    folder: str,
) -> _Written:
    """Write the files of one type: ``partition_keys`` and the windows that wait, without those that are held back.

    Under a consent policy, resources as received and dead letters are left out, because withheld resources are in them.
    """
    destination = held_windows.name_export_destination(settings.fhir_export_url)
    withholding = build_consent_gate(settings).withholds
    with warehouse.connect() as conn:
        view_tables.ensure_tables(conn, views)
        conn.commit()
        outbound = select_outbound_windows(
            conn,
            store,
            destination,
            name,
            partition_keys,
            main_view=find_main_view(views, name),
            run_id=run.run_id,
        )
        if not partition_keys and not outbound.ready:
            return _Written("", (), outbound)
        with Export(
            conn,
            store,
            build_blobs(settings, settings.fhir_export_url),
            folder,
            run_id=run.run_id,
            actor=run.actor,
            withholding=withholding,
            manifest=f"{name}.manifest.json",
        ) as export:
            files_of_type = export.for_type(name, outbound.ready)
            files = [files_of_type.write_valid(), *(files_of_type.write_table(view, "parquet") for view in views)]
            if not withholding:
                files += [files_of_type.write_raw(), files_of_type.write_dead_letters(of_windows=True)]
            path = export.finish(unreconciled={name: outbound.held})
        held_windows.release(conn, destination, name, outbound.recorded)
        conn.commit()
    return _Written(path, files, outbound)
