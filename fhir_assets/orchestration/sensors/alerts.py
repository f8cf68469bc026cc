"""The sensor ``alerts``: records incidents in ``ops.incidents`` and sends each once to ALERT_WEBHOOK_URL.

An incident is a failed run, a failed check of severity ERROR (its run succeeds nevertheless), a resource type whose
windows are behind schedule, or a schedule or sensor whose last tick failed. An incident closes when its cause is gone:
see ``recoveries.py`` and ``checks/failed_windows.py``. When it opens or closes, an observation is recorded for the
assets that it concerns.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Literal

import dagster as dg

from fhir_assets.catalog import BY_NAME
from fhir_assets.delivery.webhook import Webhook
from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.views import View
from fhir_assets.orchestration.checks.failed_windows import reevaluate_failed_windows
from fhir_assets.orchestration.failures import sanitized_errors
from fhir_assets.orchestration.jobs import APPLY_CONSENT, INCREMENTAL_LOAD
from fhir_assets.orchestration.run_ends import read_reason
from fhir_assets.orchestration.sensors.recoveries import find_assets, find_selected, record_recoveries
from fhir_assets.orchestration.tags import PARTITION_TAG, RANGE_END, RANGE_START, UNPARTITIONED
from fhir_assets.pipeline.consent.due import has_due_decisions
from fhir_assets.settings import Settings
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import checkpoints, incidents
from fhir_assets.warehouse.postgres.db.connections import Connection

PAGE_SIZE = 1000
"""The number of events that one query reads."""

_MAX_PAGES = 20
_INTERVAL_SECONDS = 30
_READ_SECONDS = 20.0
"""Seconds after which a tick stops reading events: Dagster ends a tick after 60 s."""

_MAX_NAMED_ASSETS = 3
_MAX_OBSERVED_ASSETS = 10
_MAX_NAMED_INCIDENTS = 3

_RUN_EVENTS: tuple[Literal[dg.DagsterEventType.RUN_FAILURE, dg.DagsterEventType.RUN_SUCCESS], ...] = (
    dg.DagsterEventType.RUN_FAILURE,
    dg.DagsterEventType.RUN_SUCCESS,
)


def build_alerts_sensor(
    settings: Settings, warehouse: Warehouse, store: Store, views: Sequence[View]
) -> dg.SensorDefinition:
    """Return the sensor that opens, closes and reports incidents.

    ``ops.alert_cursor`` holds the ids of the last events that were read. It is updated in the transaction that records
    their incidents, so that no event is lost or repeated if a tick is ended early.
    """
    url = settings.alert_webhook_url
    webhook = (
        Webhook(url.get_secret_value(), ui_url=settings.dagster_ui_url, seconds=settings.alert_webhook_seconds)
        if url
        else None
    )

    @dg.sensor(
        name="alerts",
        minimum_interval_seconds=_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Records incidents in ops.incidents, and reports new and closed incidents to ALERT_WEBHOOK_URL.",
    )
    def alerts(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        cursor = {"runs": 0, "checks": 0, "failed_windows": 0} | (json.loads(context.cursor) if context.cursor else {})
        with sanitized_errors(), warehouse.connect() as conn:
            before = incidents.list_open(conn)
            conn.commit()
            cursor["failed_windows"] = reevaluate_failed_windows(
                context.instance, conn, store, views, settings, before, after=cursor["failed_windows"]
            )
            conn.commit()
            runs, checks = _record_events(conn, context.instance, context.repository_def, settings, cursor)
            with conn.transaction():
                _record_types_behind(conn, settings)
                _record_ticks(conn, context.instance)
                if context.repository_def is not None:
                    record_recoveries(
                        conn,
                        context.instance,
                        context.repository_def,
                        check_runs=bool(runs or checks),
                        settled_jobs=_find_settled_jobs(conn, settings),
                    )
            delivered = webhook is None or _report(conn, context.instance, webhook)
            now = incidents.list_open(conn)
        message = f"Read {runs} ended runs and {checks} evaluations of checks. {_describe_open(now)}"
        if not delivered:
            message += ". ALERT_WEBHOOK_URL did not accept the message: the next tick sends it again"
        return dg.SensorResult(
            cursor=json.dumps(cursor),
            skip_reason=message,
            asset_events=_observe(context.instance, context.repository_def, before, now),
        )

    return alerts


def _record_events(
    conn: Connection,
    instance: dg.DagsterInstance,
    repository: dg.RepositoryDefinition | None,
    settings: Settings,
    cursor: dict[str, int],
) -> tuple[int, int]:
    """Record the runs that ended and the checks that were evaluated since the last tick, page by page.

    ``cursor`` is Dagster's cursor of the sensor; this function updates it. The cursor stored in ``ops.alert_cursor``
    takes precedence, unless it is greater than the ids of Dagster's events, as with a new Dagster database. Return the
    numbers of runs and evaluations.
    """
    if stored := incidents.get_cursor(conn):
        last = instance.event_log_storage.get_maximum_record_id() or 0
        cursor |= {"runs": stored.runs, "checks": stored.checks} if stored.runs <= last >= stored.checks else {}
    conn.commit()
    runs = checks = 0
    deadline = monotonic() + _READ_SECONDS
    for _ in range(_MAX_PAGES):
        with conn.transaction():
            cursor["runs"], read_runs = _record_runs(conn, instance, settings, cursor["runs"])
            cursor["checks"], read_checks = _record_checks(conn, instance, repository, cursor["checks"])
            incidents.set_cursor(conn, incidents.Cursor(cursor["runs"], cursor["checks"]))
        runs, checks = runs + read_runs, checks + read_checks
        if not (read_runs or read_checks) or monotonic() > deadline:
            break
    return runs, checks


def _record_ticks(conn: Connection, instance: dg.DagsterInstance) -> None:
    """Record the schedules and sensors whose last finished tick failed, and those whose last tick succeeded."""
    failing = set()
    for state in instance.all_instigator_state():
        if state.is_running:
            ticks = instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=2)
            finished = [tick.status.value for tick in ticks if tick.status.value != "STARTED"]
            if finished and finished[0] == "FAILURE":
                failing.add(state.instigator_name)
    for name in sorted(failing):
        incidents.record_failure(conn, "tick", name, [UNPARTITIONED], counts={})
    for incident in incidents.list_open(conn):
        if incident.kind == "tick" and incident.name not in failing:
            incidents.record_recovery(conn, "tick", incident.name, incident.partitions)


def _find_settled_jobs(conn: Connection, settings: Settings) -> list[str]:
    """Return the jobs without assets that have nothing left to do. Loads apply consent too."""
    due = has_due_decisions(conn, build_consent_gate(settings), datetime.now(UTC))
    return [] if due else [APPLY_CONSENT]


def _describe_open(open_incidents: Sequence[incidents.Incident]) -> str:
    if not open_incidents:
        return "No incident is open"
    names = [f"{incident.kind} {incident.name}" for incident in open_incidents[:_MAX_NAMED_INCIDENTS]]
    more = len(open_incidents) - len(names)
    return f"{len(open_incidents)} incidents are open: {', '.join(names)}" + (f" and {more} more" if more else "")


def _observe(
    instance: dg.DagsterInstance,
    repository: dg.RepositoryDefinition | None,
    before: Sequence[incidents.Incident],
    now: Sequence[incidents.Incident],
) -> list[dg.AssetObservation]:
    """Return an observation for each asset of new and closed incidents."""
    if repository is None:
        return []
    known, still_open = ({incident.id for incident in listed} for listed in (before, now))
    changed = [(incident, "opened") for incident in now if incident.id not in known]
    changed += [(incident, "closed") for incident in before if incident.id not in still_open]
    return [
        dg.AssetObservation(
            key,
            description=f"incident {change}: {incident.kind} {incident.name}",
            metadata={
                "incident": change,
                "kind": incident.kind,
                "name": incident.name,
                "partitions": len(incident.partitions),
                "opened_at": dg.MetadataValue.timestamp(incident.opened_at),
            },
        )
        for incident, change in changed
        for key in _find_assets(instance, repository, incident)[:_MAX_OBSERVED_ASSETS]
    ]


def _find_assets(
    instance: dg.DagsterInstance, repository: dg.RepositoryDefinition, incident: incidents.Incident
) -> list[dg.AssetKey]:
    if incident.kind == "tick":
        return []
    if incident.kind == "behind":
        return [dg.AssetKey(["raw", BY_NAME[name].key]) for name in incident.partitions if name in BY_NAME]
    return find_assets(instance, repository, incident)


def _report(conn: Connection, instance: dg.DagsterInstance, webhook: Webhook) -> bool:
    """Send the incidents that have not been reported yet. Return False if the webhook did not accept them."""
    accepted = True

    def deliver(opened: list[incidents.Incident], closed: list[incidents.Incident]) -> bool:
        nonlocal accepted
        failed = {incident.run_id for incident in opened if incident.kind == "run" and incident.run_id}
        reasons = {run_id: read_reason(instance, run_id) for run_id in failed}
        accepted = webhook.deliver(opened, closed, {run_id: reason for run_id, reason in reasons.items() if reason})
        return accepted

    incidents.announce(conn, deliver)
    return accepted


def _record_runs(conn: Connection, instance: dg.DagsterInstance, settings: Settings, after: int) -> tuple[int, int]:
    """Record the runs that ended since the event ``after``. Return the id of the last event, and their number."""
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
    # Failures and successes come from two queries. Events after the end of a full page are left for the next call,
    # because earlier events of the other type may be missing.
    records = [record for record in records if record.storage_id <= min(limits, default=record.storage_id)]
    for record in records:
        run = instance.get_run_by_id(record.run_id)
        if run is None:
            continue
        name, partitions = _describe_run(instance, run), _partition_keys(run, settings)
        if record.event_log_entry.dagster_event_type is dg.DagsterEventType.RUN_SUCCESS:
            incidents.record_recovery(conn, "run", name, partitions)
        elif run.tags.get("dagster/will_retry") != "true":
            counts = {"windows": len(partitions)} if partitions != [UNPARTITIONED] else {}
            incidents.record_failure(conn, "run", name, partitions, run_id=run.run_id, counts=counts)
    return records[-1].storage_id if records else after, len(records)


def _describe_run(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    """Return the name of the run's job.

    Runs that were launched manually or by a backfill belong to an implicit asset job; for them, return the names of
    their assets, or of the assets whose checks they evaluate.
    """
    if not run.job_name.startswith("__"):
        return run.job_name
    selected, checks = find_selected(instance, None, run)
    keys = sorted({key.to_user_string() for key in selected | {check.asset_key for check in checks}})
    if not keys:
        return run.job_name
    more = f" and {len(keys) - _MAX_NAMED_ASSETS} more" if len(keys) > _MAX_NAMED_ASSETS else ""
    return ", ".join(keys[:_MAX_NAMED_ASSETS]) + more


def _partition_keys(run: dg.DagsterRun, settings: Settings) -> list[str]:
    if RANGE_START in run.tags:
        scheme = settings.window_scheme
        first, last = scheme.window(run.tags[RANGE_START]), scheme.window(run.tags[RANGE_END])
        return [window.key for window in scheme.between(first.start or scheme.start, last.start or scheme.start)]
    return [run.tags.get(PARTITION_TAG, UNPARTITIONED)]


def _record_checks(
    conn: Connection, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition | None, after: int
) -> tuple[int, int]:
    """Record the checks evaluated since the event ``after``. Return the id of the last event, and their number."""
    evaluations = _read_evaluations(instance, after)
    for _, run_id, evaluation in evaluations:
        key = evaluation.asset_check_key
        if _is_summary(repository, evaluation):
            continue
        name = f"{key.asset_key.to_user_string()}:{key.name}"
        partitions = [evaluation.partition or UNPARTITIONED]
        if evaluation.passed or evaluation.severity is not dg.AssetCheckSeverity.ERROR:
            incidents.record_recovery(conn, "check", name, partitions)
        else:
            incidents.record_failure(conn, "check", name, partitions, run_id=run_id, counts=_integers(evaluation))
    return evaluations[-1][0] if evaluations else after, len(evaluations)


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

    A type is behind if its checkpoint is older than ALERT_BEHIND_MINUTES, and is not catching up if the checkpoint has
    not changed for ALERT_BEHIND_MINUTES. Types that are read from files are left out.
    """
    limit = datetime.now(UTC) - timedelta(minutes=settings.alert_behind_minutes)
    by_type = checkpoints.get(conn, settings.fhir_resource_types)
    late = [name for name, point in by_type.items() if point.source_state is None and point.loaded_until < limit]
    stuck = [name for name in late if by_type[name].moved_at < limit]
    if stuck:
        incidents.record_failure(conn, "behind", INCREMENTAL_LOAD, stuck, counts={"resource_types": len(stuck)})
    for incident in incidents.list_open(conn):
        if incident.kind == "behind":
            recovered = [name for name in incident.partitions if name not in late]
            incidents.record_recovery(conn, "behind", incident.name, recovered)
