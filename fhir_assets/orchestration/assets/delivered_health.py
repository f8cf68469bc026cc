"""The asset ``delivered/health_patient``, which shows the connector's deliveries in Dagster.

Dagster does not run the connector; ``fhir-assets connector run`` does. The sensor and the check of the asset only read
the outbox tables.
"""

import json
from datetime import datetime

import dagster as dg

from fhir_assets.delivery.connector import outbox, progress
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.settings import Settings

KEY = dg.AssetKey(["delivered", "health_patient"])
CHECK = "keeps_up"
"""The name of the asset's check, which fails if a change waits too long or the server refused a change."""

_SOURCE = "patient"
_INTERVAL_SECONDS = 60


def build_health_patient(settings: Settings, warehouse: Warehouse) -> dg.Definitions:
    """Return the asset, its check of lag and dead letters, and the sensor that reports deliveries and check results."""
    asset = dg.AssetSpec(
        KEY,
        group_name="delivered",
        description="Changes of health.patient that `fhir-assets connector run` delivered to the FHIR "
        "server. A sensor reports new deliveries at most once a minute.",
        kinds={"fhir", "postgres"},
    )

    @dg.asset_check(
        asset=KEY,
        name=CHECK,
        description="Fails if a change waits longer than CONNECTOR_MAX_LAG_SECONDS or if a dead letter is open.",
    )
    def keeps_up() -> dg.AssetCheckResult:
        with warehouse.connect() as conn:
            if not outbox.is_installed(conn):
                return dg.AssetCheckResult(passed=True, description="the outbox is not installed")
            health = progress.check_health(conn, max_lag_seconds=settings.connector_max_lag_seconds)
        return dg.AssetCheckResult(passed=health.passed, description=health.summary, metadata=_metadata(health))

    @dg.sensor(
        name="delivered_health_patient",
        minimum_interval_seconds=_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reports the connector's deliveries and the result of the check keeps_up.",
    )
    def report(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        cursor = json.loads(context.cursor) if context.cursor else {}
        with warehouse.connect() as conn:
            if not outbox.is_installed(conn):
                return dg.SensorResult(skip_reason="the outbox is not installed: `fhir-assets connector install`")
            since = datetime.fromisoformat(cursor["until"]) if cursor else None
            delivered = progress.count_since(conn, _SOURCE, since)
            health = progress.check_health(conn, max_lag_seconds=settings.connector_max_lag_seconds)
        events: list[dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckEvaluation] = []
        if delivered.changes:
            metadata = {"changes": delivered.changes, **delivered.by_outcome, "waiting": health.status.unprocessed}
            events.append(dg.AssetMaterialization(KEY, metadata=metadata))
        if delivered.changes or health.passed != cursor.get("passed"):
            events.append(
                dg.AssetCheckEvaluation(
                    asset_key=KEY,
                    check_name=CHECK,
                    passed=health.passed,
                    description=health.summary,
                    metadata=_metadata(health),
                )
            )
        new_cursor = json.dumps({"until": delivered.until.isoformat(), "passed": health.passed})
        skip_reason = None if events else "no change was delivered"
        return dg.SensorResult(asset_events=events, cursor=new_cursor, skip_reason=skip_reason)

    return dg.Definitions(assets=[asset], asset_checks=[keeps_up], sensors=[report])


def _metadata(health: progress.Health) -> dict[str, int | float]:
    return {
        "waiting": health.status.unprocessed,
        "lag_seconds": round(health.status.lag_seconds, 1),
        "dead": health.status.dead,
        "connectors": health.status.connectors,
    }
