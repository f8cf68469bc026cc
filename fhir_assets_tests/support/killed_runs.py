"""Runs whose process is killed: real commands, real signals, and what the Dagster UI shows of them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from psycopg.errors import InvalidSchemaName, UndefinedTable

from fhir_assets.orchestration.dead_runs import fail_dead_runs
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.deployment import Deployment
from fhir_assets_tests.support.graphql import open_graphql

_PAGE_OF_RUN = """
query Page($id: ID!) {
  runOrError(runId: $id) { ... on Run { status stepStats { stepKey status } } }
  logsForRun(runId: $id) { ... on EventConnection { events {
    __typename
    ... on MessageEvent { message stepKey }
    ... on ExecutionStepFailureEvent { error { message } failureMetadata { description } }
  } } }
}
"""


@contextmanager
def command(
    deployment: Deployment, *arguments: str, begin: str = "", **changed: str
) -> Iterator[subprocess.Popen[str]]:
    """Run ``fhir-assets`` in a process of its own during the block; ``begin`` is Python that it executes before."""
    code = f"{begin}\nfrom fhir_assets.cli import main; main()"
    environment = {**os.environ, **deployment.environment(), **changed}
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_step(deployment: Deployment, process: subprocess.Popen[Any]) -> str:
    """Wait until a step of a run is recorded as running, also in Dagster, and return the id of the run."""
    while True:
        with suppress(UndefinedTable, InvalidSchemaName):
            if rows := deployment.query(
                "SELECT run_id FROM ops.ingestion_runs JOIN event_logs USING (run_id)"
                " WHERE status = 'RUNNING' AND dagster_event_type = 'STEP_START' LIMIT 1"
            ):
                return str(rows[0][0])
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.02)


def find_dead_runs(deployment: Deployment) -> None:
    """Look for dead runs, as the next command and the sensors do."""
    with connect(deployment.url) as conn:
        fail_dead_runs(deployment.instance, conn)


def read_errors(deployment: Deployment, run_id: str) -> list[str]:
    """Return the errors of a run in ``ops.ingestion_runs``."""
    rows = deployment.query(
        "SELECT DISTINCT error FROM ops.ingestion_runs WHERE run_id = %s AND error IS NOT NULL", run_id
    )
    return [error for (error,) in rows]


class Page:
    """The page of a run in the Dagster UI."""

    def __init__(self, deployment: Deployment, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with open_graphql(deployment, monkeypatch) as client:
            data = client.query(_PAGE_OF_RUN, id=run_id)
        self.status: str = data["runOrError"]["status"]
        self.steps: dict[str, str] = {step["stepKey"]: step["status"] for step in data["runOrError"]["stepStats"]}
        self._events: list[dict[str, Any]] = data["logsForRun"]["events"]

    @property
    def run_reasons(self) -> list[str]:
        """The messages of the failures of the run."""
        return [event["message"] for event in self._events if event["__typename"] == "RunFailureEvent"]

    @property
    def engine_messages(self) -> list[str]:
        """The messages of Dagster and of the project about the run."""
        return [event["message"] for event in self._events if event["__typename"] == "EngineEvent"]

    @property
    def step_reasons(self) -> dict[str, str]:
        """The error of each failed step."""
        return {
            event["stepKey"]: event["error"]["message"]
            for event in self._events
            if event["__typename"] == "ExecutionStepFailureEvent"
        }
