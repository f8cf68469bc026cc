"""A landing zone in a folder or a bucket, and the ticks and runs that load its files."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import boto3
import dagster as dg

from fhir_assets.definitions import build_definitions
from fhir_assets.ingestion.runs import Ingestion
from fhir_assets.orchestration.jobs import LOAD_LANDING
from fhir_assets.settings import Settings
from fhir_assets_tests.support.deployment import Deployment


@dataclass
class LandingZone:
    """A landing zone to which a test writes files as an external process does."""

    url: str

    def put(self, name: str, content: bytes) -> None:
        if self.url.startswith("s3://"):
            bucket, prefix = self.url.removeprefix("s3://").split("/", 1)
            boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=content)
        else:
            path = Path(self.url) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def names(self) -> list[str]:
        if self.url.startswith("s3://"):
            bucket, prefix = self.url.removeprefix("s3://").split("/", 1)
            objects = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
            return sorted(item["Key"].removeprefix(f"{prefix}/") for item in objects)
        root = Path(self.url)
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@cache
def definitions(settings: Settings) -> dg.Definitions:
    """Return the definitions for the settings. They are cached, because building them takes longer than a tick."""
    return build_definitions(settings)


def tick(deployment: Deployment, sensor: str = LOAD_LANDING, cursor: str | None = None) -> dg.SensorResult:
    """Evaluate a sensor once, as the daemon does."""
    repository = definitions(deployment.settings).get_repository_def()
    context = dg.build_sensor_context(instance=deployment.instance, repository_def=repository, cursor=cursor)
    data = repository.get_sensor_def(sensor).evaluate_tick(context)
    return dg.SensorResult(run_requests=data.run_requests, cursor=data.cursor, asset_events=list(data.asset_events))


def receive(deployment: Deployment) -> dg.ExecuteInProcessResult:
    """Execute the run that the sensor requests."""
    job = definitions(deployment.settings).resolve_job_def(LOAD_LANDING)
    return job.execute_in_process(instance=deployment.instance, raise_on_error=False)


def land(deployment: Deployment) -> list[str]:
    """Evaluate the sensor twice, execute its run and load the files. Return the failed reconciliations."""
    tick(deployment)
    assert tick(deployment).run_requests
    assert receive(deployment).success
    return load_received(deployment)


def load_received(deployment: Deployment) -> list[str]:
    """Load the received resources. Return the failed reconciliations."""
    ingestion = Ingestion(deployment.settings, definitions(deployment.settings), deployment.instance)
    outcomes = [ingestion.load_received(received, triggered_by="test") for received in ingestion.find_received()]
    assert all(outcome.success for outcome in outcomes)
    return [message for outcome in outcomes for message in deployment.unreconciled(outcome)]
