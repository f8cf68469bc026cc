"""Runs that the ``fhir-assets`` command executes in its own process.

Dagster records such a run as one of the code location's job, so that the UI lists it on the page of the job and can
execute it again. ``execute_in_process`` of a job does not: its runs name no code location, and have another snapshot.
"""

from collections.abc import Mapping, Sequence

import dagster as dg

from fhir_assets.orchestration.dagster_internals import (
    InMemoryJob,
    RegisteredCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
    create_execution_plan,
    execute_run_iterator,
    snapshot_from_execution_plan,
)
from fhir_assets.orchestration.tags import MAX_RETRIES_TAG, TRIGGER_TAG

CODE_LOCATION = "fhir_assets"
"""The name of the code location in every workspace file of the project."""


def is_command_run(run: dg.DagsterRun) -> bool:
    """Return whether the command executes the run. A run that Dagster launches to execute it again has its tags too."""
    return TRIGGER_TAG in run.tags and run.parent_run_id is None


def execute_command_run(
    instance: dg.DagsterInstance,
    definitions: dg.Definitions,
    job_name: str,
    *,
    run_id: str,
    triggered_by: str,
    tags: Mapping[str, str] | None = None,
    partition_key: str | None = None,
    assets: Sequence[dg.AssetKey] | None = None,
    checks: Sequence[dg.AssetCheckKey] = (),
) -> list[dg.DagsterEvent]:
    """Create a run of a job, execute it in this process, and return its events.

    If ``assets`` is given, the run materializes only these assets of the job and evaluates only ``checks``. A failed
    step does not raise.
    """
    job = definitions.resolve_job_def(job_name)
    executed = job
    if assets is not None:
        executed = job.get_subset(asset_selection=set(assets), asset_check_selection=set(checks))
    partition = job.get_tags_for_partition_key(partition_key, selected_asset_keys=None) if partition_key else {}
    plan = create_execution_plan(executed, instance_ref=instance.get_ref() if instance.is_persistent else None)
    repository = RemoteRepositoryOrigin(
        RegisteredCodeLocationOrigin(CODE_LOCATION), definitions.get_repository_def().name
    )
    run = instance.create_run(
        job_name=job_name,
        run_id=run_id,
        run_config={},
        status=dg.DagsterRunStatus.NOT_STARTED,
        # A person waits for the command and calls it again. Without the tag, the daemon would retry a crashed run.
        tags={**job.run_tags, **partition, **(tags or {}), TRIGGER_TAG: triggered_by, MAX_RETRIES_TAG: "0"},
        root_run_id=None,
        parent_run_id=None,
        step_keys_to_execute=None,
        execution_plan_snapshot=snapshot_from_execution_plan(plan, executed.get_job_snapshot_id()),
        job_snapshot=executed.get_job_snapshot(),
        parent_job_snapshot=executed.get_parent_job_snapshot(),
        asset_selection=None if assets is None else frozenset(assets),
        asset_check_selection=None if assets is None else frozenset(checks),
        resolved_op_selection=None,
        op_selection=None,
        remote_job_origin=RemoteJobOrigin(repository, job_name),
        job_code_origin=None,
        asset_graph=executed.asset_layer.asset_graph,
    )
    return list(execute_run_iterator(InMemoryJob(job), run, instance))
