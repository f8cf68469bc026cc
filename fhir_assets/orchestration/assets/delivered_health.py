"""``delivered/health_patient``: what the connector brings to the FHIR server, seen from Dagster.

Dagster does not run the connector: it watches, through the outbox's tables.
"""

import json
from datetime import datetime

import dagster as dg

from fhir_assets.delivery.connector import outbox, progress
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.settings import Settings

KEY = dg.AssetKey(["delivered", "health_patient"])
CHECK = "keeps_up"

_SOURCE = "patient"
_MINUTE = 60


def health_patient_assets(settings: Settings, warehouse: Warehouse) -> dg.Definitions:
    """The asset, its check on lag and dead letters, and the sensor that reports both once a minute."""
    asset = dg.AssetSpec(
        KEY,
        group_name="delivered",
        description="Changes of health.patient, delivered to the FHIR server by `fhir-assets connector run`: "
        "a materialization a minute while there is work.",
        kinds={"fhir", "postgres"},
    )

    @dg.asset_check(asset=KEY, name=CHECK, description="No change waits too long, and none was refused.")
    def keeps_up() -> dg.AssetCheckResult:
        with warehouse.connect() as conn:
            if not outbox.is_installed(conn):
                return dg.AssetCheckResult(passed=True, description="the outbox is not installed")
            found = progress.health(conn, max_lag_seconds=settings.connector_max_lag_seconds)
        return dg.AssetCheckResult(passed=found.passed, description=found.said, metadata=_metadata(found))

    @dg.sensor(
        name="delivered_health_patient",
        minimum_interval_seconds=_MINUTE,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Reports what the connector delivered, and whether it keeps up.",
    )
    def report(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        seen = json.loads(context.cursor) if context.cursor else {}
        with warehouse.connect() as conn:
            if not outbox.is_installed(conn):
                return dg.SensorResult(skip_reason="the outbox is not installed: `fhir-assets connector install`")
            moment = datetime.fromisoformat(seen["until"]) if seen else None
            done = progress.since(conn, _SOURCE, moment)
            found = progress.health(conn, max_lag_seconds=settings.connector_max_lag_seconds)
        events: list[dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckEvaluation] = []
        if done.changes:
            metadata = {"changes": done.changes, **done.by_outcome, "waiting": found.status.unprocessed}
            events.append(dg.AssetMaterialization(KEY, metadata=metadata))
        if done.changes or found.passed != seen.get("passed"):
            events.append(
                dg.AssetCheckEvaluation(
                    asset_key=KEY,
                    check_name=CHECK,
                    passed=found.passed,
                    description=found.said,
                    metadata=_metadata(found),
                )
            )
        cursor = json.dumps({"until": done.until.isoformat(), "passed": found.passed})
        skipped = None if events else "nothing was delivered"
        return dg.SensorResult(asset_events=events, cursor=cursor, skip_reason=skipped)

    return dg.Definitions(assets=[asset], asset_checks=[keeps_up], sensors=[report])


def _metadata(found: progress.Health) -> dict[str, int | float]:
    return {
        "waiting": found.status.unprocessed,
        "lag_seconds": round(found.status.lag_seconds, 1),
        "dead": found.status.dead,
        "connectors": found.status.connectors,
    }
