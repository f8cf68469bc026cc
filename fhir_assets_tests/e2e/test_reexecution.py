"""*Re-execute* in the Dagster UI on the runs of `fhir-assets`, asked as the UI asks: by GraphQL."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import pytest

from fhir_assets.orchestration.dagster_internals import execute_run
from fhir_assets.orchestration.dead_runs import fail_dead_runs
from fhir_assets.orchestration.jobs import CHECK_TABLES, FETCH_MISSING_REFERENCES, INCREMENTAL_LOAD, REPLAY_DEAD_LETTERS
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import add, encounter, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.graphql import GraphqlClient, open_graphql

DAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=2)

_RUNS = """
query Runs {
  runsOrError {
    ... on Runs {
      results {
        runId
        pipelineName
        pipelineSnapshotId
        parentPipelineSnapshotId
        hasReExecutePermission
        repositoryOrigin { repositoryName repositoryLocationName }
      }
    }
  }
  repositoriesOrError {
    ... on RepositoryConnection {
      nodes { name location { name } pipelines { name pipelineSnapshotId } }
    }
  }
}
"""
_LISTED = """
query Listed($tags: [ExecutionTag!]) {
  runsOrError(filter: {tags: $tags}) { ... on Runs { results { runId } } }
}
"""
_REEXECUTE = """
mutation Reexecute($parameters: ReexecutionParams) {
  launchPipelineReexecution(reexecutionParams: $parameters) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
  }
}
"""


@pytest.fixture
def deployment(deploy: Deploy) -> Iterator[Deployment]:
    """Three windows of Patients, of which one is invalid, and Encounters."""
    with SandboxServer([]) as server:
        add(server, patient("a", DAY), patient("b", DAY + timedelta(days=1), gender="unclear"))
        add(server, encounter("e", DAY, "Patient/a"))
        yield deploy(
            fhir_base_url=server.url,
            fhir_resource_types="Patient,Encounter",
            fhir_last_updated_gte=f"{DAY:%Y-%m-%d}",
        )


def find_warnings(client: GraphqlClient) -> dict[str, str]:
    """Return the reasons for which the UI warns on *Re-execute*, by run, as ``useJobAvailabilityErrorForRun`` does."""
    data = client.query(_RUNS)
    jobs = {
        (repository["name"], repository["location"]["name"], job["name"]): job["pipelineSnapshotId"]
        for repository in data["repositoriesOrError"]["nodes"]
        for job in repository["pipelines"]
    }
    warnings = {}
    for run in data["runsOrError"]["results"]:
        if (reason := _find_reason(run, jobs)) is not None:
            warnings[run["runId"]] = f"{run['pipelineName']}: {reason}"
    return warnings


def _find_reason(run: dict[str, Any], jobs: dict[tuple[str, str, str], str]) -> str | None:
    origin = run["repositoryOrigin"]
    if origin is None:
        return "no code location"
    snapshot = jobs.get((origin["repositoryName"], origin["repositoryLocationName"], run["pipelineName"]))
    if snapshot is None:
        return "a code location that does not have the job"
    if snapshot != (run["parentPipelineSnapshotId"] or run["pipelineSnapshotId"]):
        return "another version of the job"
    return None if run["hasReExecutePermission"] else "no permission"


def reexecute(client: GraphqlClient, deployment: Deployment, run_id: str) -> dg.DagsterRun:
    """Execute a run again, as the button does, and return the new run after its end."""
    parameters = {"parentRunId": run_id, "strategy": "ALL_STEPS", "useParentRunTags": True}
    answer = client.query(_REEXECUTE, parameters=parameters)["launchPipelineReexecution"]
    assert answer["__typename"] == "LaunchRunSuccess", answer
    new_id = answer["run"]["runId"]
    with connect(deployment.url) as conn:
        fail_dead_runs(deployment.instance, conn)
    queued = deployment.instance.get_run_by_id(new_id)
    assert queued is not None
    assert queued.status is dg.DagsterRunStatus.QUEUED
    starting = dg.DagsterEvent(dg.DagsterEventType.RUN_STARTING.value, queued.job_name)
    deployment.instance.report_dagster_event(starting, new_id)
    execute_run(new_id, deployment.instance)
    ended = deployment.instance.get_run_by_id(new_id)
    assert ended is not None
    return ended


@pytest.mark.slow
def test_the_runs_of_commands_can_be_executed_again_in_the_ui_without_a_warning(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance, ingestion = deployment.instance, deployment.ingestion()
    assert all(outcome.success for outcome in deployment.ingest())
    [single] = deployment.ingest(first=DAY, last=DAY, refresh=Refresh.WINDOW)
    patients = ingestion.load(single.windows, refresh=Refresh.WINDOW, triggered_by="test", resource_types=["Patient"])
    assert ingestion.replay(Selection(), triggered_by="test")
    assert ingestion.check_tables(triggered_by="test")
    assert ingestion.fetch_missing_references(triggered_by="test") is None
    runs = {run.run_id: run for run in instance.get_runs()}
    assert {run.job_name for run in runs.values()} == {
        INCREMENTAL_LOAD,
        REPLAY_DEAD_LETTERS,
        CHECK_TABLES,
        FETCH_MISSING_REFERENCES,
    }
    with open_graphql(deployment, monkeypatch) as client:
        assert find_warnings(client) == {}
        label = {"key": ".dagster/repository", "value": "__repository__@fhir_assets"}
        assert len(client.query(_LISTED, tags=[label])["runsOrError"]["results"]) == len(runs) == 6
        again = reexecute(client, deployment, patients.run_id)
        assert again.is_success
        assert again.asset_selection == runs[patients.run_id].asset_selection
        assert again.asset_check_selection == runs[patients.run_id].asset_check_selection
        assert deployment.unreconciled(replace(patients, run_id=again.run_id)) == []
        assert find_warnings(client) == {}
    rows = deployment.query("SELECT DISTINCT triggered_by FROM ops.ingestion_runs WHERE run_id = %s", again.run_id)
    assert rows == [("manual",)]


def test_the_daemon_does_not_retry_a_command_that_was_killed(deployment: Deployment) -> None:
    assert deployment.ingestion().fetch_missing_references(triggered_by="test") is None
    [run] = deployment.instance.get_runs()
    deployment.instance.report_run_failed(run, "killed")
    ended = deployment.instance.get_run_by_id(run.run_id)
    assert ended is not None
    assert ended.tags["dagster/will_retry"] == "false"
