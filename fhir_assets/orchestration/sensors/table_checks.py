"""The sensor ``check_changed_tables``: requests evaluations of the checks of tables that have changed."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import dagster as dg

from fhir_assets.orchestration.dagster_internals import UnresolvedAssetJobDefinition
from fhir_assets.orchestration.jobs import CHECK_TABLES, LOADS
from fhir_assets.orchestration.run_requests import UNFINISHED
from fhir_assets.settings import Settings

CHECK_CHANGED_TABLES = "check_changed_tables"

_INTERVAL_SECONDS = 60
_PAUSE_FACTOR = 20
"""The minimum time between two evaluations is the duration of the first one, multiplied by this number."""

_LONGEST_PAUSE = timedelta(minutes=30)
"""At most so long, because the duration is wrong if the clock was set during the evaluation."""


def build_table_checks_sensor(
    settings: Settings, job: UnresolvedAssetJobDefinition, checks: Sequence[dg.AssetCheckKey]
) -> dg.SensorDefinition:
    """Return the sensor that keeps the results of ``checks``, which cover whole tables, up to date.

    It requests a run of the checks whose table was materialized after their last evaluation. It also requests those
    that failed before any table was materialized, because another type may have loaded a missing reference. It requests
    at most one run in CHECKS_MINUTES, and none while a load is unfinished.
    """

    @dg.sensor(
        job=job,
        name=CHECK_CHANGED_TABLES,
        minimum_interval_seconds=_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Requests evaluations of the checks of tables that have changed since the last evaluation, at most "
        "once in CHECKS_MINUTES.",
    )
    def check_changed_tables(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        instance = context.instance
        for name in (CHECK_TABLES, *LOADS):
            if instance.get_runs_count(dg.RunsFilter(job_name=name, statuses=UNFINISHED)):
                yield dg.SkipReason(f"a run of {name} is not finished yet")
                return
        now = datetime.now(UTC)
        earliest = _find_earliest(instance, timedelta(minutes=settings.checks_minutes), now)
        if now < earliest:
            yield dg.SkipReason(f"the next evaluation is requested after {earliest:%H:%M} UTC")
            return
        outdated = find_outdated_checks(instance, checks)
        if not outdated:
            yield dg.SkipReason("no table has changed since its checks were evaluated")
            return
        yield dg.RunRequest(asset_check_keys=outdated)

    return check_changed_tables


def _find_earliest(instance: dg.DagsterInstance, interval: timedelta, now: datetime) -> datetime:
    """Return the time of the next evaluation; ``now`` if there was none yet."""
    records = instance.get_run_records(dg.RunsFilter(job_name=CHECK_TABLES), limit=1)
    if not records or records[0].end_time is None or records[0].start_time is None:
        return now
    started, ended = (datetime.fromtimestamp(at, UTC) for at in (records[0].start_time, records[0].end_time))
    return compute_next_evaluation(started, ended, interval=interval, now=now)


def compute_next_evaluation(started: datetime, ended: datetime, *, interval: timedelta, now: datetime) -> datetime:
    """Return when checks are evaluated again that were last evaluated from ``started`` to ``ended``.

    That is at once if they ended in the future: the clock was ahead then.
    """
    if ended > now:
        return now
    return ended + max(interval, min(_PAUSE_FACTOR * (ended - started), _LONGEST_PAUSE))


def find_outdated_checks(instance: dg.DagsterInstance, checks: Sequence[dg.AssetCheckKey]) -> list[dg.AssetCheckKey]:
    """Return the checks that were not evaluated since the latest materialization of their table.

    Failed checks are included if any table was materialized since. Tables that were never materialized are left out.
    """
    assets = sorted({key.asset_key for key in checks})
    entries = [record.asset_entry for record in instance.get_asset_records(assets)]
    latest = {e.asset_key: e.last_materialization_record for e in entries if e.last_materialization_record}
    if not latest:
        return []
    last_change = max(record.timestamp for record in latest.values())
    executions = instance.event_log_storage.get_latest_asset_check_execution_by_key(checks)
    outdated = []
    for key in checks:
        if key.asset_key not in latest:
            continue
        execution = executions.get(key)
        event = execution.event.dagster_event if execution and execution.event else None
        evaluation = event.event_specific_data if event else None
        if execution is None or not isinstance(evaluation, dg.AssetCheckEvaluation):
            outdated.append(key)
            continue
        target = evaluation.target_materialization_data
        is_about_latest = target is not None and target.storage_id >= latest[key.asset_key].storage_id
        if not is_about_latest or (not evaluation.passed and execution.create_timestamp < last_change):
            outdated.append(key)
    return outdated
