"""The GraphQL API of Dagster's webserver, in this process, on the instance and code location of a deployment."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fhir_assets_tests.support.dagster_internals import open_workspace
from fhir_assets_tests.support.deployment import Deployment

_CHECKS = """
query Checks($key: AssetKeyInput!) {
  assetNodeOrError(assetKey: $key) {
    ... on AssetNode {
      assetChecksOrError {
        ... on AssetChecks {
          checks {
            name
            executionForLatestMaterialization { status evaluation { partition success } }
            partitionStatuses { ... on AssetCheckTimePartitionStatuses { ranges { startTime endTime status } } }
          }
        }
      }
    }
  }
}
"""
_HISTORY = """
query History($key: AssetKeyInput!, $name: String!, $partition: String) {
  assetCheckExecutions(assetKey: $key, checkName: $name, partition: $partition, limit: 100) { runId status }
}
"""
_METADATA = """
query Metadata($key: AssetKeyInput!) {
  assetNodeOrError(assetKey: $key) {
    ... on AssetNode {
      assetMaterializations {
        partition
        metadataEntries { label ... on IntMetadataEntry { intValue } }
      }
    }
  }
}
"""


class GraphqlClient:
    """Asks what the pages of assets and checks ask. Assets are written ``normalized/patient``."""

    def __init__(self, context: Any) -> None:
        from dagster_graphql.schema import create_schema

        self._schema = create_schema()
        self._context = context

    def query(self, text: str, **variables: object) -> Any:
        """Return the data of a query. Fail if it has errors."""
        request = self._context.create_request_context()
        result = asyncio.run(self._schema.execute_async(text, context_value=request, variable_values=variables))
        assert not result.errors, result.errors
        return result.data

    def read_checks(self, asset: str) -> dict[str, dict[str, Any]]:
        """Return the checks of an asset by name."""
        node = self.query(_CHECKS, key=_key(asset))["assetNodeOrError"]
        return {check["name"]: check for check in node["assetChecksOrError"]["checks"]}

    def read_partition_statuses(self, asset: str, check: str) -> dict[float, str]:
        """Return the statuses of a check by the start of the window, in seconds since 1970. Windows are days."""
        statuses: dict[float, str] = {}
        for found in self.read_checks(asset)[check]["partitionStatuses"]["ranges"]:
            start = found["startTime"]
            while start < found["endTime"]:
                statuses[start] = found["status"]
                start += 86_400
        return statuses

    def read_results(self, asset: str) -> dict[str, bool | None]:
        """Return the results that the page of an asset shows; None for a check that reads as not evaluated."""
        results: dict[str, bool | None] = {}
        for name, check in self.read_checks(asset).items():
            execution = check["executionForLatestMaterialization"]
            results[name] = execution["evaluation"]["success"] if execution and execution["evaluation"] else None
        return results

    def read_history(self, asset: str, check: str, partition: str) -> list[str]:
        """Return the statuses of all executions of a check for a window, newest first."""
        executions = self.query(_HISTORY, key=_key(asset), name=check, partition=partition)["assetCheckExecutions"]
        return [execution["status"] for execution in executions]

    def read_metadata(self, asset: str) -> dict[str, dict[str, int]]:
        """Return the integers in the metadata of the latest materialization of each window."""
        found: dict[str, dict[str, int]] = {}
        for event in self.query(_METADATA, key=_key(asset))["assetNodeOrError"]["assetMaterializations"]:
            entries = {entry["label"]: entry["intValue"] for entry in event["metadataEntries"] if "intValue" in entry}
            found.setdefault(event["partition"], entries)
        return found


def _key(asset: str) -> dict[str, list[str]]:
    return {"path": asset.split("/")}


@contextmanager
def open_graphql(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> Iterator[GraphqlClient]:
    """Open the API for a deployment, whose settings are put into the environment."""
    for name, value in deployment.environment().items():
        monkeypatch.setenv(name, value)
    with open_workspace(deployment.instance) as context:
        yield GraphqlClient(context)
