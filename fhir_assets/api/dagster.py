"""The running Dagster instance, through its webserver's own GraphQL."""

from collections.abc import Mapping, Sequence
from time import monotonic, sleep
from typing import Any

import requests

from fhir_assets.errors import DagsterUnavailable

FINISHED = frozenset({"SUCCESS", "FAILURE", "CANCELED"})
_LOOK_SECONDS = 0.5

_REPOSITORIES = """
query { repositoriesOrError { __typename ... on RepositoryConnection {
  nodes { name location { name } jobs { name } } } } }
"""
_LAUNCH = """
mutation ($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } } }
"""
_STATUS = "query ($id: ID!) { runOrError(runId: $id) { __typename ... on Run { status } } }"


class DagsterClient:
    """Starts runs and looks at them. Threads may share one."""

    def __init__(self, url: str, *, timeout: float = 30) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._places: dict[str, tuple[str, str]] = {}

    def launch(
        self, job: str, *, assets: Sequence[Sequence[str]] | None = None, tags: Mapping[str, str] | None = None
    ) -> str:
        """Start a run of a job, of some of its assets if given. Returns its id. Raises DagsterUnavailable."""
        location, repository = self._place(job)
        selector: dict[str, Any] = {
            "jobName": job,
            "repositoryName": repository,
            "repositoryLocationName": location,
        }
        if assets is not None:
            selector["assetSelection"] = [{"path": list(path)} for path in assets]
        metadata = {"tags": [{"key": key, "value": value} for key, value in (tags or {}).items()]}
        params = {"selector": selector, "executionMetadata": metadata, "runConfigData": {}}
        found = self._ask(_LAUNCH, {"params": params})["launchRun"]
        if found["__typename"] != "LaunchRunSuccess":
            self._places.clear()
            raise DagsterUnavailable(f"Dagster at {self.url} did not start {job}: {found['__typename']}")
        return str(found["run"]["runId"])

    def status(self, run_id: str) -> str | None:
        """The run's status as Dagster names it; None if it knows no such run. Raises DagsterUnavailable."""
        found = self._ask(_STATUS, {"id": run_id})["runOrError"]
        return str(found["status"]) if found["__typename"] == "Run" else None

    def wait(self, run_id: str, seconds: float) -> str | None:
        """The run's status when it has ended, or after ``seconds``. Raises DagsterUnavailable."""
        until = monotonic() + seconds
        while (status := self.status(run_id)) not in FINISHED and monotonic() < until:
            sleep(min(_LOOK_SECONDS, max(0.0, until - monotonic())))
        return status

    def is_ready(self) -> bool:
        """Whether the webserver answers, and has the project's jobs."""
        try:
            return bool(self._repositories())
        except DagsterUnavailable:
            return False

    def link(self, run_id: str) -> str:
        """The run's page in the UI."""
        return f"{self.url}/runs/{run_id}"

    def _place(self, job: str) -> tuple[str, str]:
        if job not in self._places:
            for node in self._repositories():
                self._places |= {each["name"]: (node["location"]["name"], node["name"]) for each in node["jobs"]}
        try:
            return self._places[job]
        except KeyError:
            raise DagsterUnavailable(
                f"Dagster at {self.url} has no job {job}: its code location is not loaded, or is another one"
            ) from None

    def _repositories(self) -> list[dict[str, Any]]:
        found = self._ask(_REPOSITORIES, {})["repositoriesOrError"]
        return list(found.get("nodes", []))

    def _ask(self, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        try:
            answer = requests.post(
                f"{self.url}/graphql", json={"query": query, "variables": variables}, timeout=self._timeout
            )
            content = answer.json()
        except (requests.RequestException, ValueError):
            raise DagsterUnavailable(
                f"Dagster's webserver at {self.url} does not answer: start it (`fhir-assets dev`), or correct "
                "DAGSTER_WEBSERVER_URL"
            ) from None
        data = content.get("data") if isinstance(content, dict) else None
        if answer.status_code != 200 or not isinstance(data, dict):
            raise DagsterUnavailable(f"Dagster's webserver at {self.url} answered {answer.status_code} without data")
        return data
