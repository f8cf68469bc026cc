"""A client of the Dagster webserver: starts runs and reads their status through its GraphQL API.

``dagster_graphql.DagsterGraphQLClient`` is not used, for three reasons: threads cannot share it, because its transport
refuses concurrent queries; it cannot query whether a code location is loaded, which ``is_ready`` needs; and it queries
the location of a job before each run.
"""

from collections.abc import Mapping, Sequence
from time import monotonic, sleep
from typing import Any

import orjson
import requests
from urllib3.exceptions import HTTPError

from fhir_assets.errors import DagsterUnavailable, NotFhir
from fhir_assets.fhir.transport.limits import ANSWER_TIMEOUTS, AnswerLimits
from fhir_assets.fhir.transport.session import Session
from fhir_assets.retries import TransientFailure

FINISHED = frozenset({"SUCCESS", "FAILURE", "CANCELED"})
"""The statuses of a run that has ended."""
_POLL_SECONDS = 0.5

_REPOSITORIES = """
query { repositoriesOrError { __typename ... on RepositoryConnection {
  nodes { name location { name } jobs { name } } } } }
"""
_LAUNCH = """
mutation ($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } } }
"""
_STATUS = "query ($id: ID!) { runOrError(runId: $id) { __typename ... on Run { status } } }"

_REASONS = """
query ($id: ID!, $after: String) { logsForRun(runId: $id, afterCursor: $after, limit: 1000) {
  ... on EventConnection { cursor hasMore events { __typename ... on RunFailureEvent { message } } } } }
"""
_MAX_PAGES = 20


class DagsterClient:
    """Starts runs and reads their status. Threads may share a client."""

    def __init__(self, url: str, *, timeout: float = 30) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._limits = AnswerLimits(ANSWER_TIMEOUTS * timeout)
        self._repository_of_job: dict[str, tuple[str, str]] = {}

    def launch(
        self,
        job: str,
        *,
        assets: Sequence[Sequence[str]] | None = None,
        checks: Sequence[tuple[Sequence[str], str]] = (),
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Start a run of a job and return the run's id.

        ``assets`` are the paths of the asset keys to materialize, by default all assets of the job. ``checks`` are the
        checks to evaluate with ``assets``, each as the path of its asset and its name.

        Raises DagsterUnavailable.
        """
        location, repository = self._find_repository(job)
        selector: dict[str, Any] = {
            "jobName": job,
            "repositoryName": repository,
            "repositoryLocationName": location,
        }
        if assets is not None:
            selector["assetSelection"] = [{"path": list(path)} for path in assets]
            selector["assetCheckSelection"] = [
                {"assetKey": {"path": list(path)}, "name": name} for path, name in checks
            ]
        metadata = {"tags": [{"key": key, "value": value} for key, value in (tags or {}).items()]}
        params = {"selector": selector, "executionMetadata": metadata, "runConfigData": {}}
        result = self._query(_LAUNCH, {"params": params})["launchRun"]
        if result["__typename"] != "LaunchRunSuccess":
            self._repository_of_job.clear()
            raise DagsterUnavailable(f"Dagster at {self.url} did not start {job}: {result['__typename']}")
        return str(result["run"]["runId"])

    def status(self, run_id: str) -> str | None:
        """Return Dagster's status of a run, or None if there is no such run. Raises DagsterUnavailable."""
        result = self._query(_STATUS, {"id": run_id})["runOrError"]
        return str(result["status"]) if result["__typename"] == "Run" else None

    def find_reason(self, run_id: str) -> str | None:
        """Return what Dagster says about the failure of a run, None if it did not fail. Raises DagsterUnavailable."""
        after = None
        for _ in range(_MAX_PAGES):
            page = self._query(_REASONS, {"id": run_id, "after": after})["logsForRun"]
            for event in page.get("events", []):
                if event["__typename"] == "RunFailureEvent":
                    return str(event["message"])
            if not page.get("hasMore"):
                break
            after = page["cursor"]
        return None

    def wait(self, run_id: str, seconds: float) -> str | None:
        """Wait until a run has ended, at most ``seconds``, and return its status. Raises DagsterUnavailable."""
        deadline = monotonic() + seconds
        while (status := self.status(run_id)) not in FINISHED and monotonic() < deadline:
            sleep(min(_POLL_SECONDS, max(0.0, deadline - monotonic())))
        return status

    def is_ready(self) -> bool:
        """Return whether the webserver answers and has a code location loaded."""
        try:
            return bool(self._repositories())
        except DagsterUnavailable:
            return False

    def link(self, run_id: str) -> str:
        """Return the URL of the run's page in the Dagster UI."""
        return f"{self.url}/runs/{run_id}"

    def _find_repository(self, job: str) -> tuple[str, str]:
        """Return the names of the code location and the repository of a job."""
        if job not in self._repository_of_job:
            for node in self._repositories():
                self._repository_of_job |= {
                    named_job["name"]: (node["location"]["name"], node["name"]) for named_job in node["jobs"]
                }
        try:
            return self._repository_of_job[job]
        except KeyError:
            raise DagsterUnavailable(
                f"Dagster at {self.url} has no job {job}: check in its UI that the code location of "
                "fhir_assets is loaded"
            ) from None

    def _repositories(self) -> list[dict[str, Any]]:
        result = self._query(_REPOSITORIES, {})["repositoriesOrError"]
        return list(result.get("nodes", []))

    def _query(self, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        try:
            with Session(self._limits) as session:
                answer = session.exchange(
                    "POST",
                    f"{self.url}/graphql",
                    json={"query": query, "variables": variables},
                    timeout=self._timeout,
                )
            content = orjson.loads(answer.body)
        except (requests.RequestException, HTTPError, TransientFailure, NotFhir, ValueError):
            raise DagsterUnavailable(
                f"Dagster's webserver at {self.url} does not answer: start it (`fhir-assets dev`), or correct "
                "DAGSTER_WEBSERVER_URL"
            ) from None
        data = content.get("data") if isinstance(content, dict) else None
        if answer.status != 200 or not isinstance(data, dict):
            raise DagsterUnavailable(f"Dagster's webserver at {self.url} answered {answer.status} without data")
        return data
