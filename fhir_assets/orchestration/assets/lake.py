"""The assets ``lake/<view>``: the tables as Parquet files in FHIR_LAKE_URL, for data that outgrows Postgres.

Windows that do not reconcile are held back; the first update after they reconcile writes them.
"""

from collections.abc import Iterator, Sequence

import dagster as dg

from fhir_assets.deployment.store import build_blobs
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.views import View
from fhir_assets.orchestration.assets.outbound import emit_outbound_results
from fhir_assets.orchestration.failures import sanitized_errors
from fhir_assets.orchestration.run_context import read_run_context
from fhir_assets.pipeline.lake.step import LakeStep
from fhir_assets.settings import Settings
from fhir_assets.steps.consent import apply_consent
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.postgres.tables.view_tables import build_layout


def build_lake_assets(
    settings: Settings, partitions: dg.PartitionsDefinition[str], views: Sequence[View]
) -> list[dg.AssetsDefinition]:
    """Return an asset for each view of the resource types, or an empty list if FHIR_LAKE_URL is not set."""
    types = settings.fhir_resource_types
    if not settings.fhir_lake_url:
        return []
    return [_build_lake_asset(settings, partitions, view, views) for view in views if view.resource_type in types]


def _build_lake_asset(
    settings: Settings,
    partitions: dg.PartitionsDefinition[str],
    view: View,
    all_views: Sequence[View],
) -> dg.AssetsDefinition:
    columns = build_layout(view, encrypted=settings.encrypts).readable_columns

    @dg.asset(
        name=view.name,
        key_prefix="lake",
        group_name="lake",
        deps=[dg.AssetKey(["normalized", view.name])],
        partitions_def=partitions,
        output_required=False,
        backfill_policy=dg.BackfillPolicy.multi_run(settings.fhir_windows_per_run),
        # A run updates the files of all windows of the view, so a run of the newest window suffices.
        automation_condition=dg.AutomationCondition.eager(),
        description=f"{view.description or view.title or view.name}: Parquet, one folder for each window.",
        code_version=view.fingerprint,
        kinds={"fhir", "parquet"},
        metadata={
            "dagster/column_schema": dg.TableSchema(
                [dg.TableColumn(column.name, column.type, description=column.description) for column in columns]
            ),
            "dagster/uri": f"{settings.fhir_lake_url.rstrip('/')}/{view.name}",
        },
    )
    def lake_asset(
        context: dg.AssetExecutionContext, store: dg.ResourceParam[Store], warehouse: dg.ResourceParam[Warehouse]
    ) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
        run = read_run_context(context, settings.window_scheme)
        target = build_blobs(settings, settings.fhir_lake_url)
        step = LakeStep(warehouse.connect, store, target, all_views, run_id=run.run_id, actor=run.actor)
        with sanitized_errors():
            apply_consent(settings, warehouse, all_views, run)
            [(_, written)] = step.run(view.resource_type, [view], run.partition_keys)
        metadata = {
            "windows_written": written.windows,
            "windows_removed": written.removed,
            "rows": written.rows,
            "bytes": written.bytes,
        }
        yield from emit_outbound_results(context, dg.AssetKey(["lake", view.name]), written.held, metadata)

    return lake_asset
