"""What the Dagster UI shows of checks and partitions after each kind of run, asked as the UI asks: by GraphQL."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest

from fhir_assets.definitions import build_definitions
from fhir_assets.orchestration.check_names import TABLE_CHECKS
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets_tests.support.content import add, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.graphql import GraphqlClient, open_graphql

TABLE = "normalized/patient"
NOW = datetime.now(UTC)
DAYS = [NOW.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=age) for age in (3, 2, 1)]
TODAY = DAYS[-1] + timedelta(days=1)
BAD_DAY = f"{DAYS[1]:%Y-%m-%d}"


@pytest.fixture
def deployment(deploy: Deploy) -> Iterator[Deployment]:
    """Three days with 4 patients each, of which one of the second day has a gender that R4 does not know."""
    with SandboxServer([]) as server:
        for day in DAYS:
            for n in range(4):
                gender = "unclear" if day == DAYS[1] and n == 0 else "male"
                add(server, patient(f"p{day:%d}-{n}", day + timedelta(hours=n), gender=gender))
        yield deploy(
            fhir_base_url=server.url,
            fhir_resource_types="Patient",
            fhir_last_updated_gte=f"{DAYS[0]:%Y-%m-%d}",
            dead_letter_error_rate=0.15,
        )


def read_windows(client: GraphqlClient, check: str = "dead_letter_rate") -> list[str | None]:
    """Return the statuses of a check for the three days and today."""
    statuses = client.read_partition_statuses(TABLE, check)
    return [statuses.get(day.timestamp()) for day in (*DAYS, TODAY)]


def execute_all(deployment: Deployment) -> None:
    """Execute all checks of the table together, as the button does."""
    definitions = build_definitions(deployment.settings)
    asset = dg.AssetKey(TABLE.split("/"))
    keys = {key for key in definitions.resolve_asset_graph().asset_check_keys if key.asset_key == asset}
    job = definitions.resolve_implicit_global_asset_job_def()
    subset = job.get_subset(asset_selection=set(), asset_check_selection=keys)
    assert subset.execute_in_process(instance=deployment.instance).success


def test_partition_statuses_history_and_metadata_are_true_after_each_kind_of_run(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_graphql(deployment, monkeypatch) as client:
        # A range run.
        assert all(outcome.success for outcome in deployment.ingest())
        loaded = ["SUCCEEDED", "FAILED", "SUCCEEDED", "SUCCEEDED"]
        assert read_windows(client) == loaded
        assert read_windows(client, "reconciles") == ["SUCCEEDED"] * 4
        assert client.read_history(TABLE, "dead_letter_rate", BAD_DAY) == ["FAILED"]
        metadata = client.read_metadata(TABLE)
        assert [metadata[f"{day:%Y-%m-%d}"]["dagster/partition_row_count"] for day in (*DAYS, TODAY)] == [4, 3, 4, 0]
        assert client.read_results(TABLE)["volume"] is not None

        # A single run.
        assert all(
            outcome.success for outcome in deployment.ingest(first=DAYS[1], last=DAYS[1], refresh=Refresh.WINDOW)
        )
        assert read_windows(client) == loaded
        assert client.read_history(TABLE, "dead_letter_rate", BAD_DAY) == ["FAILED", "FAILED"]
        metadata = client.read_metadata(TABLE)
        assert (metadata[BAD_DAY]["dagster/partition_row_count"], metadata[BAD_DAY]["dead"]) == (3, 1)

        # Execute all.
        execute_all(deployment)
        assert read_windows(client) == loaded
        results = client.read_results(TABLE)
        assert {results[name] for name in TABLE_CHECKS & set(results)} <= {True, False}
        history = client.read_history(TABLE, "dead_letter_rate", BAD_DAY)

        # A tick that brings nothing.
        assert deployment.ingestion().due_loads.extend(deployment.ingestion().due_loads.find()) == []
        assert read_windows(client) == loaded
        assert client.read_results(TABLE) == results
        assert client.read_history(TABLE, "dead_letter_rate", BAD_DAY) == history
        assert client.read_metadata(TABLE) == metadata

        # A replay that heals.
        deployment.settings = deployment.settings.model_copy(
            update={"validation_warn_rules": ("required-binding:Patient.gender",)}
        )
        assert all(o.success for o in deployment.ingestion().replay(Selection(), triggered_by="test"))
        assert read_windows(client) == ["SUCCEEDED"] * 4
        assert client.read_history(TABLE, "dead_letter_rate", BAD_DAY) == ["SUCCEEDED", *history]
        assert client.read_metadata(TABLE)[BAD_DAY]["dagster/partition_row_count"] == 4
