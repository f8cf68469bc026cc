"""The windows that do not reconcile. Those whose check failed are evaluated again, as the cause may be gone by now."""

import os
from collections.abc import Sequence

import dagster as dg

from fhir_assets.catalog import BY_KEY
from fhir_assets.fhir.views import View
from fhir_assets.orchestration.check_names import RECONCILES
from fhir_assets.orchestration.checks.window import evaluate_reconciliation
from fhir_assets.pipeline.reconcile.verdicts import evaluate_windows
from fhir_assets.pipeline.reconcile.window_counts import WindowCounts, find_main_view
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.dagster import check_results
from fhir_assets.warehouse.postgres.db import connections
from fhir_assets.warehouse.postgres.db.connections import Session


def find_unreconciled_windows(
    instance: dg.DagsterInstance, conn: Session, store: Store, views: Sequence[View], resource_types: Sequence[str]
) -> list[tuple[str, WindowCounts]]:
    """Return the windows of the types that do not reconcile, with their type and counts.

    Only windows whose last evaluation failed are counted again. Those that now reconcile are reported to Dagster.
    """
    with connections.connect(os.environ["DAGSTER_POSTGRES_URL"]) as dagster_conn:
        failed = check_results.find_failed_partitions(dagster_conn, RECONCILES)
    keys_by_type: dict[str, list[str]] = {}
    for path, partition_key in failed:
        resource_type = BY_KEY.get(path[-1])
        if resource_type is not None and resource_type.name in resource_types:
            keys_by_type.setdefault(resource_type.name, []).append(partition_key)
    unreconciled = []
    for name, keys in keys_by_type.items():
        for counts in evaluate_windows(conn, store, name, keys, main_view=find_main_view(views, name)):
            if counts.faults:
                unreconciled.append((name, counts))
            else:
                instance.report_runless_asset_event(evaluate_reconciliation(instance, name, counts))
    return unreconciled
