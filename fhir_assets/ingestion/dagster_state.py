"""What Dagster's own database says, read without Dagster, to find out whether a command needs Dagster at all.

A database without Dagster's tables has no run. If they are in another schema, the answer is yes.
"""

import psycopg

from fhir_assets.catalog import BY_KEY
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.check_names import RECONCILES
from fhir_assets.orchestration.instance import config
from fhir_assets.orchestration.tags import FHIR_SERVER_POOL
from fhir_assets.settings import Settings
from fhir_assets.warehouse.dagster import activity, check_results
from fhir_assets.warehouse.ops import liveness


def may_have_dead_runs(settings: Settings, warehouse: Warehouse) -> bool:
    """Return whether a run is unfinished, in Dagster or in ``ops.ingestion_runs``. Its process may have ended.

    Raises DatabaseUnavailable and ConfigurationError.
    """
    with warehouse.connect() as conn:
        if liveness.find_dead(conn):
            return True
    with config.connect_to_dagster_database(config.find_dagster_url(settings)) as conn:
        try:
            return activity.has_unfinished_runs(conn)
        except psycopg.errors.UndefinedTable:
            conn.rollback()
            return activity.has_tables(conn)


def limits_fetches(settings: Settings) -> bool:
    """Return whether an operator has limited the steps that fetch, in the UI. Raises as ``may_have_dead_runs`` does."""
    with config.connect_to_dagster_database(config.find_dagster_url(settings)) as conn:
        try:
            return activity.has_limit(conn, FHIR_SERVER_POOL)
        except psycopg.errors.UndefinedTable:
            conn.rollback()
            return activity.has_tables(conn)


def may_have_unreconciled_windows(settings: Settings) -> bool:
    """Return whether the last reconciliation of a window failed. Raises as ``may_have_dead_runs`` does."""
    with config.connect_to_dagster_database(config.find_dagster_url(settings)) as conn:
        try:
            failed = check_results.find_failed_partitions(conn, RECONCILES)
        except psycopg.errors.UndefinedTable:
            conn.rollback()
            return activity.has_tables(conn)
    types = {resource_type.name for path, _ in failed if (resource_type := BY_KEY.get(path[-1]))}
    return not types.isdisjoint(settings.fhir_resource_types)
