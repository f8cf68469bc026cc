"""Finds out which partitions of an incident have recovered, through any run.

A failed run recovers when the assets and checks of its failed steps are materialized or evaluated again, by any job, or
when its job has nothing left to do. A failed check recovers when it passes, and when it or its asset no longer exists.
"""

from collections.abc import Collection, Iterator

import dagster as dg

from fhir_assets.orchestration.dagster_internals import AssetCheckEvaluationPlanned, AssetMaterializationPlannedData
from fhir_assets.orchestration.jobs import MISSING_REFERENCES
from fhir_assets.orchestration.tags import UNPARTITIONED
from fhir_assets.warehouse.ops import incidents
from fhir_assets.warehouse.ops.incidents import Incident
from fhir_assets.warehouse.postgres.db.connections import Connection

_STEP_EVENTS = {dg.DagsterEventType.STEP_FAILURE}
_PLANNED_EVENTS = {
    dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
    dg.DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED,
}


def record_recoveries(
    conn: Connection,
    instance: dg.DagsterInstance,
    repository: dg.RepositoryDefinition,
    *,
    check_runs: bool,
    settled_jobs: Collection[str] = (),
) -> None:
    """Record the recoveries of open incidents.

    ``check_runs`` is False if nothing ran since the last call, so that failed runs cannot have recovered. Nothing is
    left to do for ``settled_jobs``: others have done what their failed runs did not.
    """
    checks = {_name_check(key) for key in repository.asset_graph.asset_check_keys}
    for incident in incidents.list_open(conn):
        if incident.kind == "check" and incident.name not in checks:
            incidents.record_recovery(conn, "check", incident.name, incident.partitions)
        elif incident.kind == "run" and incident.name in settled_jobs:
            incidents.record_recovery(conn, "run", incident.name, incident.partitions)
        elif incident.kind == "run" and check_runs:
            recovered = _find_recovered_partitions(instance, repository, incident)
            incidents.record_recovery(conn, "run", incident.name, recovered)


def find_assets(
    instance: dg.DagsterInstance, repository: dg.RepositoryDefinition, incident: Incident
) -> list[dg.AssetKey]:
    """Return the assets of the run or check of an incident, in order, without those that no longer exist."""
    existing = repository.asset_graph.get_all_asset_keys()
    if incident.kind == "check":
        key = dg.AssetKey(incident.name.rpartition(":")[0].split("/"))
        return [key] if key in existing else []
    run = instance.get_run_by_id(incident.run_id) if incident.run_id else None
    if run is None:
        return []
    keys, checks = _find_failed(instance, repository, run)
    return sorted({*keys, *(check.asset_key for check in checks)} & existing)


def _find_recovered_partitions(
    instance: dg.DagsterInstance, repository: dg.RepositoryDefinition, incident: Incident
) -> list[str]:
    """Return the partitions of a failed run whose failed assets and checks have been updated since then."""
    run = instance.get_run_by_id(incident.run_id) if incident.run_id else None
    if run is None:
        return []
    first = instance.get_records_for_run(run.run_id, limit=1).records
    if not first:
        return []
    keys, checks = _find_failed(instance, repository, run)
    existing = repository.asset_graph.get_all_asset_keys()
    recovered = set(incident.partitions)
    for key in keys & existing:
        if key == MISSING_REFERENCES:
            # Each materialization fetches the missing references of all windows.
            fetched = _find_materialized(instance, key, {UNPARTITIONED}, first[0].storage_id)
            recovered = recovered if fetched else set()
        else:
            recovered &= _find_materialized(instance, key, recovered, first[0].storage_id)
    if checks:
        since = first[0].event_log_entry.timestamp
        latest = instance.event_log_storage.get_latest_asset_check_execution_by_key(
            sorted(checks, key=lambda key: (key.asset_key, key.name))
        )
        evaluated = {
            key
            for key, record in latest.items()
            if record.run_id != run.run_id and record.create_timestamp > since and record.evaluation is not None
        }
        known = checks & set(repository.asset_graph.asset_check_keys)
        if not known <= evaluated:
            return []
    return sorted(recovered) if keys or checks else []


def _find_materialized(
    instance: dg.DagsterInstance, key: dg.AssetKey, partitions: Collection[str], after: int
) -> set[str]:
    """Return the given partitions of an asset that were materialized after an event."""
    if UNPARTITIONED in partitions:
        records = instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=key, after_storage_id=after), limit=1
        ).records
        return {UNPARTITIONED} if records else set()
    return set(
        instance.get_latest_storage_id_by_partition(
            key, dg.DagsterEventType.ASSET_MATERIALIZATION, set(partitions), after_cursor=after
        )
    )


def find_selected(
    instance: dg.DagsterInstance, repository: dg.RepositoryDefinition | None, run: dg.DagsterRun
) -> tuple[set[dg.AssetKey], set[dg.AssetCheckKey]]:
    """Return the assets that were selected for a run, or the selected checks if it has no assets."""
    if run.asset_selection:
        return set(run.asset_selection), set()
    if run.asset_check_selection:
        return set(), set(run.asset_check_selection)
    if repository is not None and not run.job_name.startswith("__") and repository.has_job(run.job_name):
        return set(repository.get_job(run.job_name).asset_layer.selected_asset_keys), set()
    keys: set[dg.AssetKey] = set()
    checks: set[dg.AssetCheckKey] = set()
    for record in instance.get_records_for_run(run.run_id, of_type=_PLANNED_EVENTS).records:
        event = record.event_log_entry.dagster_event
        data = event.event_specific_data if event else None
        if isinstance(data, AssetMaterializationPlannedData):
            keys.add(data.asset_key)
        elif isinstance(data, AssetCheckEvaluationPlanned):
            checks.add(data.asset_check_key)
    return keys, set() if keys else checks


def _find_failed(
    instance: dg.DagsterInstance, repository: dg.RepositoryDefinition, run: dg.DagsterRun
) -> tuple[set[dg.AssetKey], set[dg.AssetCheckKey]]:
    """Return the assets and checks of the failed steps of a run, or of the whole run if no step failed.

    The latter is without missing references, which other runs of the same windows do not fetch.
    """
    selected, checks = find_selected(instance, repository, run)
    steps = set(_list_failed_steps(instance, run.run_id))
    failed = {
        key
        for key, definition in repository.assets_defs_by_key.items()
        if definition.is_executable and definition.op.name in steps and key in selected
    }
    return failed or selected - {MISSING_REFERENCES} or selected, checks


def _list_failed_steps(instance: dg.DagsterInstance, run_id: str) -> Iterator[str]:
    for record in instance.get_records_for_run(run_id, of_type=_STEP_EVENTS).records:
        if record.event_log_entry.step_key:
            yield record.event_log_entry.step_key


def _name_check(key: dg.AssetCheckKey) -> str:
    return f"{key.asset_key.to_user_string()}:{key.name}"
