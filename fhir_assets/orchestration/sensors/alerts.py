"""The sensor ``alerts``: notices what fails and what recovered, and tells ALERT_WEBHOOK_URL, once an incident."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import dagster as dg
from dagster._core.event_api import RunStatusChangeEventType, RunStatusChangeRecordsFilter

from fhir_assets.delivery.webhook import Webhook
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.run_context import sanitized_errors
from fhir_assets.orchestration.tags import RANGE_END, RANGE_START
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import checkpoints, incidents
from fhir_assets.warehouse.postgres.db.connections import Connection

AT_ONCE = 1000
"""How many events are read at once."""

_PAGES = 20
_SECONDS = 30
_SCHEDULE = "incremental_load"
_NAMED = 3
_WHOLE = ""
"""Stands for the one partition of what has none."""
_RUN_EVENTS: tuple[RunStatusChangeEventType, ...] = (
    dg.DagsterEventType.RUN_FAILURE,
    dg.DagsterEventType.RUN_SUCCESS,
)


def alerts_sensor(settings: Settings, warehouse: Warehouse) -> dg.SensorDefinition:
    """Keeps ``ops.incidents``: failed runs, failed checks of severity ERROR (which leave their run green), and windows
    behind schedule. The cursor is the last event read: a restart misses none.
    """
    url = settings.alert_webhook_url
    webhook = Webhook(url.get_secret_value(), ui_url=settings.dagster_ui_url) if url else None

    @dg.sensor(
        name="alerts",
        minimum_interval_seconds=_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Keeps ops.incidents, and tells ALERT_WEBHOOK_URL what began to fail and what is over.",
    )
    def alerts(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        seen = json.loads(context.cursor) if context.cursor else {"runs": 0, "checks": 0}
        with sanitized_errors(), warehouse.connect() as conn:
            with conn.transaction():
                for _ in range(_PAGES):
                    before = dict(seen)
                    seen["runs"] = _runs(conn, context.instance, settings, seen["runs"])
                    seen["checks"] = _checks(conn, context.instance, context.repository_def, seen["checks"])
                    if seen == before:
                        break
                _behind(conn, settings)
            told = True
            if webhook:

                def deliver(began: list[incidents.Incident], over: list[incidents.Incident]) -> bool:
                    nonlocal told
                    told = webhook.deliver(began, over)
                    return told

                incidents.tell(conn, deliver)
            open_now = len(incidents.still_open(conn))
        said = f"{open_now} incidents are open" if open_now else "nothing fails"
        if not told:
            said += "; ALERT_WEBHOOK_URL does not take the message: it is tried again at the next tick"
        return dg.SensorResult(cursor=json.dumps(seen), skip_reason=said)

    return alerts


def _runs(conn: Connection, instance: dg.DagsterInstance, settings: Settings, after: int) -> int:
    """What ended since the event ``after``. Returns the last event read."""
    records: list[dg.EventLogRecord] = []
    complete = []
    for kind in _RUN_EVENTS:
        result = instance.fetch_run_status_changes(
            RunStatusChangeRecordsFilter(kind, after_storage_id=after), limit=AT_ONCE, ascending=True
        )
        records += result.records
        if result.has_more:
            complete.append(result.records[-1].storage_id)
    records.sort(key=lambda record: record.storage_id)
    # Failures and successes are read by themselves: only up to where both were read is their order known.
    records = [record for record in records if record.storage_id <= min(complete, default=record.storage_id)]
    for record in records:
        run = instance.get_run_by_id(record.run_id)
        if run is None:
            continue
        name, partitions = _name(run), _partitions(run, settings)
        if record.event_log_entry.dagster_event_type is dg.DagsterEventType.RUN_SUCCESS:
            incidents.recovered(conn, "run", name, partitions)
        elif run.tags.get("dagster/will_retry") != "true":
            counts = {"windows": len(partitions)} if partitions != [_WHOLE] else {}
            incidents.failed(conn, "run", name, partitions, run_id=run.run_id, counts=counts)
    return records[-1].storage_id if records else after


def _name(run: dg.DagsterRun) -> str:
    """The job; for what was started by hand or by a backfill of assets, which is one job for all, the assets."""
    if not run.job_name.startswith("__") or not run.asset_selection:
        return run.job_name
    keys = sorted(key.to_user_string() for key in run.asset_selection)
    return ", ".join(keys[:_NAMED]) + (f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else "")


def _partitions(run: dg.DagsterRun, settings: Settings) -> list[str]:
    if RANGE_START in run.tags:
        scheme = settings.window_scheme
        first, last = scheme.window(run.tags[RANGE_START]), scheme.window(run.tags[RANGE_END])
        return [window.key for window in scheme.between(first.start or scheme.start, last.start or scheme.start)]
    return [run.tags.get("dagster/partition", _WHOLE)]


def _checks(
    conn: Connection, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition | None, after: int
) -> int:
    """What was evaluated since the event ``after``. Returns the last event read."""
    records = _evaluations(instance, after)
    for storage_id, run_id, evaluation in records:
        del storage_id
        key = evaluation.asset_check_key
        if _is_summary(repository, evaluation):
            continue
        name = f"{key.asset_key.to_user_string()}:{key.name}"
        partition = [evaluation.partition or _WHOLE]
        if evaluation.passed:
            incidents.recovered(conn, "check", name, partition)
        elif evaluation.severity is dg.AssetCheckSeverity.ERROR:
            incidents.failed(conn, "check", name, partition, run_id=run_id, counts=_counts(evaluation))
    return records[-1][0] if records else after


def _evaluations(instance: dg.DagsterInstance, after: int) -> Sequence[tuple[int, str, dg.AssetCheckEvaluation]]:
    records = instance.event_log_storage.get_event_records(
        dg.EventRecordsFilter(dg.DagsterEventType.ASSET_CHECK_EVALUATION, after_cursor=after),
        limit=AT_ONCE,
        ascending=True,
    )
    return [
        (record.storage_id, record.run_id, data)
        for record in records
        if record.event_log_entry.dagster_event
        and isinstance(data := record.event_log_entry.dagster_event.event_specific_data, dg.AssetCheckEvaluation)
    ]


def _is_summary(repository: dg.RepositoryDefinition | None, evaluation: dg.AssetCheckEvaluation) -> bool:
    """In a run of several windows each has an evaluation of its own, and their sum has one without a partition."""
    if evaluation.partition is not None or repository is None:
        return False
    graph = repository.asset_graph
    key = evaluation.asset_check_key
    return key in graph.asset_check_keys and graph.get(key).partitions_def is not None


def _counts(evaluation: dg.AssetCheckEvaluation) -> dict[str, int]:
    """The numbers of an evaluation: the metadata that are integers."""
    return {
        name: value.value
        for name, value in evaluation.metadata.items()
        if isinstance(value, dg.IntMetadataValue) and value.value
    }


def _behind(conn: Connection, settings: Settings) -> None:
    """Types that are neither up to date nor catching up: for ALERT_BEHIND_MINUTES their checkpoint has been older than
    that, and has not moved. Files have no schedule of their own.
    """
    oldest = datetime.now(UTC) - timedelta(minutes=settings.alert_behind_minutes)
    known = checkpoints.get(conn, settings.fhir_resource_types)
    late = [name for name, each in known.items() if each.source_state is None and each.loaded_until < oldest]
    stuck = [name for name in late if known[name].moved_at < oldest]
    if stuck:
        incidents.failed(conn, "behind", _SCHEDULE, stuck, counts={"resource_types": len(stuck)})
    incidents.recovered(conn, "behind", _SCHEDULE, [name for name in known if name not in late])
