"""The sensor ``alerts``: records incidents in ``ops.incidents`` and sends each once to ALERT_WEBHOOK_URL.

An incident is a failed run, a failed check of severity ERROR (its run succeeds nevertheless), or a resource type whose
windows are behind schedule. An incident closes when the same partitions succeed.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal

import dagster as dg

from fhir_assets.delivery.webhook import Webhook
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.failures import sanitized_errors
from fhir_assets.orchestration.jobs import INCREMENTAL_LOAD
from fhir_assets.orchestration.tags import PARTITION_TAG, RANGE_END, RANGE_START
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import checkpoints, incidents
from fhir_assets.warehouse.postgres.db.connections import Connection

PAGE_SIZE = 1000
"""The number of events that one query reads."""

_MAX_PAGES = 20
_INTERVAL_SECONDS = 30
_MAX_NAMED_ASSETS = 3
_UNPARTITIONED = ""
"""The partition of a run or check without partitions in ``ops.incidents``."""

_RUN_EVENTS: tuple[Literal[dg.DagsterEventType.RUN_FAILURE, dg.DagsterEventType.RUN_SUCCESS], ...] = (
    dg.DagsterEventType.RUN_FAILURE,
    dg.DagsterEventType.RUN_SUCCESS,
)


def build_alerts_sensor(settings: Settings, warehouse: Warehouse) -> dg.SensorDefinition:
    """Return the sensor that opens, closes and reports incidents.

    The cursor holds the ids of the last events that were read, so that no event is missed after a restart.
    """
    url = settings.alert_webhook_url
    webhook = Webhook(url.get_secret_value(), ui_url=settings.dagster_ui_url) if url else None

    @dg.sensor(
        name="alerts",
        minimum_interval_seconds=_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Records incidents in ops.incidents, and reports new and closed incidents to ALERT_WEBHOOK_URL.",
    )
    def alerts(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        cursor = json.loads(context.cursor) if context.cursor else {"runs": 0, "checks": 0}
        with sanitized_errors(), warehouse.connect() as conn:
            with conn.transaction():
                for _ in range(_MAX_PAGES):
                    previous = dict(cursor)
                    cursor["runs"] = _record_runs(conn, context.instance, settings, cursor["runs"])
                    cursor["checks"] = _record_checks(conn, context.instance, context.repository_def, cursor["checks"])
                    if cursor == previous:
                        break
                _record_types_behind(conn, settings)
            delivered = webhook is None or _report(conn, webhook)
            open_incidents = len(incidents.list_open(conn))
        message = f"{open_incidents} incidents are open" if open_incidents else "no incident is open"
        if not delivered:
            message += "; ALERT_WEBHOOK_URL did not accept the message: the next tick sends it again"
        return dg.SensorResult(cursor=json.dumps(cursor), skip_reason=message)

    return alerts


def _report(conn: Connection, webhook: Webhook) -> bool:
    """Send the incidents that have not been reported yet. Return False if the webhook did not accept them."""
    accepted = True

    def deliver(began: list[incidents.Incident], over: list[incidents.Incident]) -> bool:
        nonlocal accepted
        accepted = webhook.deliver(began, over)
        return accepted

    incidents.announce(conn, deliver)
    return accepted


def _record_runs(conn: Connection, instance: dg.DagsterInstance, settings: Settings, after: int) -> int:
    """Record the runs that ended since the event ``after``. Return the id of the last event that was read."""
    records: list[dg.EventLogRecord] = []
    limits = []
    for event_type in _RUN_EVENTS:
        result = instance.fetch_run_status_changes(
            dg.RunStatusChangeRecordsFilter(event_type, after_storage_id=after), limit=PAGE_SIZE, ascending=True
        )
        records += result.records
        if result.has_more:
            limits.append(result.records[-1].storage_id)
    records.sort(key=lambda record: record.storage_id)
    # Failures and successes come from two queries. Beyond the end of the shorter page their order is unknown.
    records = [record for record in records if record.storage_id <= min(limits, default=record.storage_id)]
    for record in records:
        run = instance.get_run_by_id(record.run_id)
        if run is None:
            continue
        name, partitions = _describe_run(run), _partition_keys(run, settings)
        if record.event_log_entry.dagster_event_type is dg.DagsterEventType.RUN_SUCCESS:
            incidents.record_recovery(conn, "run", name, partitions)
        elif run.tags.get("dagster/will_retry") != "true":
            counts = {"windows": len(partitions)} if partitions != [_UNPARTITIONED] else {}
            incidents.record_failure(conn, "run", name, partitions, run_id=run.run_id, counts=counts)
    return records[-1].storage_id if records else after


def _describe_run(run: dg.DagsterRun) -> str:
    """Return the name of the run's job.

    Runs that were launched manually or by a backfill belong to an implicit asset job; for them, return the names of
    their assets.
    """
    if not run.job_name.startswith("__") or not run.asset_selection:
        return run.job_name
    keys = sorted(key.to_user_string() for key in run.asset_selection)
    more = f" and {len(keys) - _MAX_NAMED_ASSETS} more" if len(keys) > _MAX_NAMED_ASSETS else ""
    return ", ".join(keys[:_MAX_NAMED_ASSETS]) + more


def _partition_keys(run: dg.DagsterRun, settings: Settings) -> list[str]:
    if RANGE_START in run.tags:
        scheme = settings.window_scheme
        first, last = scheme.window(run.tags[RANGE_START]), scheme.window(run.tags[RANGE_END])
        return [window.key for window in scheme.between(first.start or scheme.start, last.start or scheme.start)]
    return [run.tags.get(PARTITION_TAG, _UNPARTITIONED)]


def _record_checks(
    conn: Connection, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition | None, after: int
) -> int:
    """Record the checks evaluated since the event ``after``. Return the id of the last event that was read."""
    evaluations = _read_evaluations(instance, after)
    for _, run_id, evaluation in evaluations:
        key = evaluation.asset_check_key
        if _is_summary(repository, evaluation):
            continue
        name = f"{key.asset_key.to_user_string()}:{key.name}"
        partitions = [evaluation.partition or _UNPARTITIONED]
        if evaluation.passed:
            incidents.record_recovery(conn, "check", name, partitions)
        elif evaluation.severity is dg.AssetCheckSeverity.ERROR:
            incidents.record_failure(conn, "check", name, partitions, run_id=run_id, counts=_integers(evaluation))
    return evaluations[-1][0] if evaluations else after


def _read_evaluations(instance: dg.DagsterInstance, after: int) -> Sequence[tuple[int, str, dg.AssetCheckEvaluation]]:
    """Return the next page of evaluations: (id of the event, run id, evaluation)."""
    records = instance.event_log_storage.get_event_records(
        dg.EventRecordsFilter(dg.DagsterEventType.ASSET_CHECK_EVALUATION, after_cursor=after),
        limit=PAGE_SIZE,
        ascending=True,
    )
    return [
        (record.storage_id, record.run_id, data)
        for record in records
        if record.event_log_entry.dagster_event
        and isinstance(data := record.event_log_entry.dagster_event.event_specific_data, dg.AssetCheckEvaluation)
    ]


def _is_summary(repository: dg.RepositoryDefinition | None, evaluation: dg.AssetCheckEvaluation) -> bool:
    """Return whether an evaluation summarizes a range run, whose windows have evaluations of their own."""
    if evaluation.partition is not None or repository is None:
        return False
    graph = repository.asset_graph
    key = evaluation.asset_check_key
    return key in graph.asset_check_keys and graph.get(key).partitions_def is not None


def _integers(evaluation: dg.AssetCheckEvaluation) -> dict[str, int]:
    """Return the metadata entries of an evaluation that are integers other than zero."""
    return {
        name: value.value
        for name, value in evaluation.metadata.items()
        if isinstance(value, dg.IntMetadataValue) and value.value
    }


def _record_types_behind(conn: Connection, settings: Settings) -> None:
    """Record the resource types that are behind schedule and not catching up.

    The checkpoint of these types is older than ALERT_BEHIND_MINUTES and has not moved for ALERT_BEHIND_MINUTES. Types
    that are read from files are left out.
    """
    limit = datetime.now(UTC) - timedelta(minutes=settings.alert_behind_minutes)
    by_type = checkpoints.get(conn, settings.fhir_resource_types)
    late = [name for name, point in by_type.items() if point.source_state is None and point.loaded_until < limit]
    stuck = [name for name in late if by_type[name].moved_at < limit]
    if stuck:
        incidents.record_failure(conn, "behind", INCREMENTAL_LOAD, stuck, counts={"resource_types": len(stuck)})
    incidents.record_recovery(conn, "behind", INCREMENTAL_LOAD, [name for name in by_type if name not in late])
