"""What a person starts in the UI: a replay of chosen dead letters; and what starts again by itself after an outage."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import pytest

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.definitions import build_definitions
from fhir_assets.orchestration.tags import RETRY_TAG
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.content import add, materialize, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment

DAY = datetime(2024, 1, 5, tzinfo=UTC)
SETTINGS: dict[str, Any] = {"fhir_last_updated_gte": "2024-01-05", "fhir_resource_types": "Patient"}


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    with SandboxServer([]) as server:
        add(server, patient("gender", DAY, gender="malee"), patient("date", DAY, birthDate="yesterday"))
        yield server


def request_replay(deployment: Deployment, **config: object) -> dg.ExecuteInProcessResult:
    job = build_definitions(deployment.settings).resolve_job_def("request_replay")
    return job.execute_in_process(
        instance=deployment.instance,
        run_config={"ops": {"mark_dead_letters": {"config": config}}},
        raise_on_error=False,
    )


def list_marked(deployment: Deployment) -> list[tuple[object, ...]]:
    return deployment.query("SELECT resource_id FROM ops.dead_letters WHERE status = 'replaying' ORDER BY 1")


def test_a_replay_is_chosen_by_type_rule_and_window(deploy: Deploy, server: SandboxServer) -> None:
    # Another deployment in this process: Dagster keeps config schemas for the whole process.
    build_definitions(deploy(fhir_resource_types="Encounter").settings).resolve_job_def("request_replay")
    deployment = deploy(fhir_base_url=server.url, **SETTINGS)
    deployment.ingest(first=DAY, last=DAY)
    [(rule,)] = deployment.query("SELECT rule FROM ops.dead_letters WHERE resource_id = 'gender'")
    assert request_replay(deployment, rule="no-such-rule").success
    assert request_replay(deployment, windows=["2024-01-06"]).success
    assert list_marked(deployment) == []
    assert request_replay(deployment, resource_type="Patient", rule=str(rule)).success
    assert list_marked(deployment) == [("gender",)]
    assert request_replay(deployment).success
    assert list_marked(deployment) == [("date",), ("gender",)]
    with pytest.raises(dg.DagsterInvalidConfigError, match="Encounter"):
        request_replay(deployment, resource_type="Encounter")


def test_a_run_that_found_no_server_is_started_again_and_a_run_of_a_command_is_not(deploy: Deploy) -> None:
    url = f"http://127.0.0.1:{find_free_port()}/fhir"
    deployment = deploy(fhir_base_url=url, fhir_max_attempts=1, **SETTINGS)

    def run_tags(run_id: str) -> dict[str, str]:
        run = deployment.instance.get_run_by_id(run_id)
        assert run is not None
        return dict(run.tags)

    result = materialize(deployment, "raw/patient", windows=["2024-01-05"])
    assert not result.success
    assert run_tags(result.run_id)[RETRY_TAG] == "true"
    assert run_tags(result.run_id)["dagster/will_retry"] == "true"
    [outcome] = deployment.ingest(first=DAY, last=DAY)
    assert not outcome.success
    assert RETRY_TAG not in run_tags(outcome.run_id)
