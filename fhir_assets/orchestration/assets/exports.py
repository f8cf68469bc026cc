"""The assets ``exports/<type>``: the windows of a run as files in FHIR_EXPORT_URL.

Each run writes one folder, with the valid resources as NDJSON and the tables as Parquet. Windows that do not reconcile
are held back; the first run after they reconcile includes them.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import dagster as dg

from fhir_assets.catalog import BY_NAME, ResourceType
from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.store import build_blobs
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.views import View
from fhir_assets.orchestration.assets.outbound import emit_outbound_results
from fhir_assets.orchestration.consent import apply_consent
from fhir_assets.orchestration.failures import sanitized_errors
from fhir_assets.orchestration.run_context import RunContext
from fhir_assets.pipeline.reconcile.verdicts import select_outbound_windows
from fhir_assets.pipeline.reconcile.window_counts import find_main_view
from fhir_assets.settings import Settings
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.exports.export import Export, build_run_folder
from fhir_assets.warehouse.ops import held_windows
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
    views = [view for view in all_views if view.resource_type == resource_type.name]

    @dg.asset(
        name=resource_type.key,
        key_prefix="exports",
        group_name="exports",
        deps=[dg.AssetKey(["normalized", view.name]) for view in views],
        partitions_def=partitions,
        output_required=False,
        backfill_policy=dg.BackfillPolicy.multi_run(settings.fhir_windows_per_run),
        description=f"{resource_type.name}: the windows of a run as NDJSON and Parquet files in FHIR_EXPORT_URL.",
        kinds={"fhir", "parquet"},
    )
    def exports(
        context: dg.AssetExecutionContext, store: dg.ResourceParam[Store], warehouse: dg.ResourceParam[Warehouse]
    ) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
        run = RunContext.from_context(context, settings.window_scheme)
        with sanitized_errors(), warehouse.connect() as conn:
            apply_consent(settings, warehouse, all_views, run)
            view_tables.ensure_tables(conn, views)
            conn.commit()
            destination = f"exports {settings.fhir_export_url}"
            started_at = held_windows.read_clock(conn)
            outbound = select_outbound_windows(
                conn,
                store,
                destination,
                resource_type.name,
                run.partition_keys,
                main_view=find_main_view(views, resource_type.name),
                run_id=run.run_id,
            )
            start = context.instance.get_run_stats(run.run_id).start_time
            folder = build_run_folder(run.run_id, datetime.fromtimestamp(start or run.now.timestamp(), UTC))
            target = build_blobs(settings, settings.fhir_export_url)
            with Export(
                conn,
                store,
                target,
                folder,
                run_id=run.run_id,
                actor=run.triggered_by,
                withholding=build_consent_gate(settings).withholds,
                manifest=f"{resource_type.name}.manifest.json",
            ) as export:
                files_of_type = export.for_type(resource_type.name, outbound.ready)
                files = [files_of_type.write_valid(), *(files_of_type.write_table(view, "parquet") for view in views)]
                path = export.finish(unreconciled={resource_type.name: outbound.held})
            held_windows.release(conn, destination, resource_type.name, outbound.ready, before=started_at)
            conn.commit()
        metadata = {
            "folder": dg.MetadataValue.path(path),
            "rows": sum(file.rows for file in files),
            "bytes": sum(file.bytes for file in files),
            "files": len(files),
        }
        key = dg.AssetKey(["exports", resource_type.key])
        yield from emit_outbound_results(context, key, outbound.held, metadata, released=outbound.released)

    return exports
