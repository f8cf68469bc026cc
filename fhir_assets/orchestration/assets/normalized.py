"""The assets ``normalized/<view>``: one table for each ViewDefinition, and ``fhir.resource`` with the complete JSON."""

import re
from collections.abc import Iterator, Sequence

import dagster as dg

from fhir_assets.catalog import BY_NAME, ResourceType
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.views import BrokenView, View
from fhir_assets.orchestration.asset_attributes import build_asset_attributes, build_documentation
from fhir_assets.orchestration.check_names import DEAD_LETTER_RATE
from fhir_assets.orchestration.checks.after_load import log_checks_after_load
from fhir_assets.orchestration.checks.window import WindowChecks, window_check_specs
from fhir_assets.orchestration.failures import record_unreported, sanitized_errors
from fhir_assets.orchestration.io_managers.postgres import LoadedView
from fhir_assets.orchestration.run_context import read_run_context, step_tags
from fhir_assets.orchestration.step_log import describe_counts, describe_rules, log_line
from fhir_assets.orchestration.window_metadata import PARTITION_ROW_COUNT, add_window_metadata
from fhir_assets.pipeline.reconcile.verdicts import evaluate_windows
from fhir_assets.pipeline.reconcile.window_counts import find_main_view, list_windows
from fhir_assets.settings import Settings
from fhir_assets.steps.layers import LayerSteps, LoadedType
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import runs
from fhir_assets.warehouse.postgres.tables.layout import holds_phi
from fhir_assets.warehouse.postgres.tables.view_tables import (
    build_layout,
    count_rows,
    count_rows_by_window,
)

MAX_OTHER_WINDOWS = 100
"""The largest number of windows outside its run for which a load evaluates the check ``dead_letter_rate`` again.

A newer version of a resource resolves the dead letters of its older versions, which may be in other windows.
"""


def build_normalized_assets(
    settings: Settings, partitions: dg.PartitionsDefinition[str], views: Sequence[View]
) -> list[dg.AssetsDefinition]:
    """Return the normalized layer: one step for each resource type, which loads all of its views in one pass."""
    return [
        _build_normalized_step(settings, partitions, BY_NAME[name], views_of_type, views)
        for name in settings.fhir_resource_types
        if (views_of_type := [view for view in views if view.resource_type == name])
    ]


def _build_normalized_step(
    settings: Settings,
    partitions: dg.PartitionsDefinition[str],
    resource_type: ResourceType,
    views: Sequence[View],
    all_views: Sequence[View],
) -> dg.AssetsDefinition:
    name = resource_type.name
    has_main_view = any(view.name == resource_type.key for view in views)
    main_view = find_main_view(views, name)

    @dg.multi_asset(
        name=f"normalized__{resource_type.key}",
        description=f"Load the valid {name} resources of the windows into the tables of their views.",
        # A dependency, not an input: Dagster cannot load an input in a run without partitions, which only evaluates
        # checks.
        deps=[["validated", resource_type.key]],
        outs={view.name: _output(view, resource_type, settings) for view in views},
        check_specs=window_check_specs(resource_type, partitions) if has_main_view else [],
        partitions_def=partitions,
        backfill_policy=dg.BackfillPolicy.multi_run(settings.fhir_windows_per_run),
        can_subset=True,
        op_tags=step_tags([name]),
    )
    def normalized(
        context: dg.AssetExecutionContext,
        store: dg.ResourceParam[Store],
        warehouse: dg.ResourceParam[Warehouse],
        steps: dg.ResourceParam[LayerSteps],
    ) -> Iterator[dg.Output[LoadedView] | dg.AssetCheckResult]:
        checks = WindowChecks(resource_type, settings)
        check_names = sorted(key.name for key in context.selected_asset_check_keys)
        if not context.has_partition_key and not context.has_partition_key_range:
            # A run without partitions, which executes all checks of the table in the UI. It loads nothing.
            with sanitized_errors(), warehouse.connect() as conn:
                counts = evaluate_windows(conn, store, name, list_windows(store, name), main_view=main_view)
                yield from checks.evaluate(context, conn, counts, check_names)
            return
        run = read_run_context(context, settings.window_scheme)
        names = context.op_execution_context.selected_output_names
        selected = [view for view in views if view.name in names]
        resolved_windows: list[str] = []
        if selected:
            with sanitized_errors():
                done = steps.load(run, name, [view.name for view in selected])
            with record_unreported(run, warehouse, [name]):
                loaded = done.result
                resolved_windows = sorted(loaded.resolved_windows.difference(run.partition_keys))[:MAX_OTHER_WINDOWS]
                _log_load(context, name, done)
                metadata = _metadata(done)
                with warehouse.connect() as conn:
                    rows, written = count_rows(conn, selected), loaded.count_rows_by_view()
                    window_rows = count_rows_by_window(
                        conn, selected, name, run.partition_keys, loaded.find_new_windows()
                    )
                    window_counts = runs.find_counts(conn, run.run_id, name, run.partition_keys)
                for view in selected:
                    metadata_by_window = {
                        key: {
                            PARTITION_ROW_COUNT: window_rows[view.name][key],
                            **window_counts.get(key, {}),
                            **metadata,
                        }
                        for key in run.partition_keys
                    }
                    add_window_metadata(
                        context.op_execution_context.get_step_execution_context(),
                        dg.AssetKey(["normalized", view.name]),
                        metadata_by_window,
                    )
                    table = LoadedView(view.name, written[view.name], rows[view.name])
                    yield dg.Output(table, output_name=view.name)
        if any(view.name == resource_type.key for view in selected):
            with record_unreported(run, warehouse, [name]), warehouse.connect() as conn:
                log_checks_after_load(context, conn, settings, resource_type, views)
        if check_names:
            with record_unreported(run, warehouse, [name]), warehouse.connect() as conn:
                counts = evaluate_windows(conn, store, name, run.partition_keys, main_view=main_view)
                yield from checks.evaluate(context, conn, counts, check_names)
                if resolved_windows and DEAD_LETTER_RATE in check_names:
                    others = evaluate_windows(conn, store, name, resolved_windows, main_view=main_view)
                    checks.log_other_windows(context, conn, others, DEAD_LETTER_RATE)

    return normalized


def build_broken_view(broken: BrokenView) -> dg.AssetSpec:
    """Return an asset that shows an invalid ViewDefinition file and its error. It cannot be materialized."""
    return dg.AssetSpec(
        ["broken_views", re.sub(r"\W", "_", broken.path.stem)],
        group_name="broken_views",
        description=f"Not loaded: {broken.message}",
        metadata={"view_file": dg.MetadataValue.path(str(broken.path))},
        kinds={"fhir"},
    )


def _log_load(context: dg.AssetExecutionContext, resource_type: str, done: LoadedType) -> None:
    loaded = done.result
    counts = {
        "inserted": loaded.inserted,
        "updated": loaded.updated,
        "superseded": loaded.superseded,
        "withheld": loaded.withheld,
        "dead letters": loaded.dead_by_rule.total(),
        "rows": loaded.rows.total(),
    }
    if any(counts.values()):
        log_line(context, describe_counts(resource_type, counts, done.seconds))
    if loaded.dead_by_rule:
        log_line(context, f"{resource_type}: dead letters by rule: {describe_rules(loaded.dead_by_rule)}")


def _metadata(done: LoadedType) -> dict[str, dg.MetadataValue]:
    """Return the metadata of the run, which is the same for all of its windows."""
    loaded, seconds = done.result, done.seconds
    return {
        "run_resources": dg.IntMetadataValue(loaded.resources),
        "run_inserted": dg.IntMetadataValue(loaded.inserted),
        "run_updated": dg.IntMetadataValue(loaded.updated),
        "run_seconds": dg.FloatMetadataValue(round(seconds, 3)),
        "run_resources_per_second": dg.IntMetadataValue(round(loaded.resources / seconds) if seconds else 0),
        "run_dead_letters_by_rule": dg.JsonMetadataValue(dict(loaded.dead_by_rule.most_common())),
    }


def _output(view: View, resource_type: ResourceType, settings: Settings) -> dg.AssetOut:
    phi = holds_phi(view)
    return dg.AssetOut(
        key=["normalized", view.name],
        io_manager_key="postgres",
        is_required=False,
        description=view.description or view.title,
        code_version=view.fingerprint,
        **build_asset_attributes(resource_type, "normalized", "postgres", owners=settings.fhir_owners, phi=phi),
        metadata={
            "dagster/column_schema": dg.TableSchema(
                [
                    dg.TableColumn(column.name, column.type, description=column.description)
                    for column in build_layout(view, encrypted=settings.encrypts).readable_columns
                ]
            ),
            "dagster/table_name": f"fhir.{view.name}",
            "view_url": view.url or "",
            "view_version": view.version or "",
            "paths_not_compiled": len(view.fallbacks),
            **build_documentation(resource_type),
            **_code_references(view),
        },
    )


def _code_references(view: View) -> dict[str, dg.CodeReferencesMetadataValue]:
    """Return the file of a ViewDefinition as the code of its table."""
    if view.path is None:
        return {}
    reference = dg.LocalFileCodeReference(file_path=str(view.path), label="ViewDefinition")
    return {"dagster/code_references": dg.CodeReferencesMetadataValue(code_references=[reference])}
