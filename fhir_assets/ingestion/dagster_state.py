"""What Dagster's own database says, read without Dagster, to find out whether a command needs Dagster at all."""

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.check_names import RECONCILES
from fhir_assets.orchestration.instance import config
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
        return activity.has_unfinished_runs(conn)


def has_unreconciled_windows(settings: Settings) -> bool:
    """Return whether the last reconciliation of a window failed. Raises as ``may_have_dead_runs`` does."""
    with config.connect_to_dagster_database(config.find_dagster_url(settings)) as conn:
        return bool(check_results.find_failed_partitions(conn, RECONCILES))
