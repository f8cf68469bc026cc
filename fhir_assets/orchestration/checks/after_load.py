"""The checks of a table that every load evaluates: their queries take milliseconds.

The other checks of tables are evaluated by the sensor ``check_changed_tables`` after loads.
"""

from collections.abc import Sequence

import dagster as dg

from fhir_assets.catalog import ResourceType
from fhir_assets.fhir.views import View
from fhir_assets.orchestration.check_names import PATIENTS_KNOWN, VOLUME
from fhir_assets.orchestration.checks.table import TableEvaluator, list_table_checks
from fhir_assets.orchestration.checks.window import log_evaluations
from fhir_assets.orchestration.dagster_internals import AssetCheckEvaluationTargetMaterializationData
from fhir_assets.settings import Settings
from fhir_assets.warehouse.postgres.db.connections import Session
from fhir_assets.warehouse.postgres.tables import view_tables

AFTER_LOAD = frozenset({VOLUME, PATIENTS_KNOWN})
"""The checks that every load evaluates.

Loads do not change what the other checks compare, or the queries of those checks read whole tables. ``schema_matches``
needs three queries for each view, which is half the time of an empty window; ``no_failed_partitions`` would open a
second incident for a failed run while its windows are loaded again.
"""


def log_checks_after_load(
    context: dg.AssetExecutionContext,
    conn: Session,
    settings: Settings,
    resource_type: ResourceType,
    views: Sequence[View],
) -> None:
    """Evaluate the checks of the main table of a type after its materialization, and log the results.

    The run does not plan these checks, so that a run without this step does not change their results.
    """
    log_evaluations(context, evaluate_after_load(context.instance, conn, settings, resource_type, views))


def evaluate_after_load(
    instance: dg.DagsterInstance,
    conn: Session,
    settings: Settings,
    resource_type: ResourceType,
    views: Sequence[View],
) -> list[dg.AssetCheckEvaluation]:
    """Return the evaluations of the checks after the latest materialization; none if there was no materialization."""
    asset = dg.AssetKey(["normalized", resource_type.key])
    records = instance.fetch_materializations(asset, limit=1).records
    if not records:
        return []
    target = AssetCheckEvaluationTargetMaterializationData(
        storage_id=records[0].storage_id, run_id=records[0].run_id, timestamp=records[0].timestamp
    )
    evaluator = TableEvaluator(settings, resource_type, views)
    existing = view_tables.find_existing_tables(conn, views)
    results = [evaluator.evaluate(conn, existing, name) for name in list_table_checks(settings) if name in AFTER_LOAD]
    return [_to_evaluation(asset, result, target) for result in results]


def _to_evaluation(
    asset: dg.AssetKey, result: dg.AssetCheckResult, target: AssetCheckEvaluationTargetMaterializationData
) -> dg.AssetCheckEvaluation:
    assert result.check_name is not None
    return dg.AssetCheckEvaluation(
        asset_key=asset,
        check_name=result.check_name,
        passed=result.passed,
        description=result.description,
        metadata=result.metadata,
        severity=result.severity,
        target_materialization_data=target,
    )
