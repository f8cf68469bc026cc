"""The post loader waits while Postgres is stopped, at its start and later, and loads posts when it is back."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fhir_assets.warehouse.postgres.db import embedded, migrations
from fhir_assets_tests.support.api import Api, api_in_threads
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.posts import deploy_hospital, is_running, start_command, wait_until

pytestmark = pytest.mark.slow

Hospital = tuple[Deployment, Path]


@pytest.fixture
def hospital(deploy: Deploy, tmp_path: Path) -> Iterator[Hospital]:
    """A deployment on a Postgres of its own, which is stopped, and the home of this Postgres."""
    server = tmp_path / "server"
    url = embedded.ensure(server)
    try:
        migrations.upgrade(url)
        deployment = deploy_hospital(deploy, tmp_path, url=url)
        embedded.stop(server)
        yield deployment, server
    finally:
        embedded.stop(server)


def test_a_post_loader_waits_while_postgres_is_stopped_and_goes_on_when_it_is_back(
    hospital: Hospital, tmp_path: Path
) -> None:
    deployment, server = hospital
    log = tmp_path / "post-loader.log"
    loader = start_command(deployment, tmp_path, "post-loader")
    try:
        wait_until(lambda: "waiting for the database" in log.read_text() or loader.poll() is not None)
        assert loader.poll() is None, log.read_text()
        embedded.ensure(server)
        wait_until(lambda: loader.poll() is not None or is_running(deployment))
        with api_in_threads(deployment.settings) as api:
            post_and_see(api, "a")
            embedded.stop(server)
            wait_until(lambda: "the connection to the database was lost" in log.read_text())
            embedded.ensure(server)
            wait_until(lambda: is_running(deployment))
            post_and_see(api, "b")
        assert deployment.query("SELECT DISTINCT triggered_by FROM ops.ingestion_runs") == [("posts",)]
        loader.send_signal(signal.SIGTERM)
        assert loader.wait(60) == 0, log.read_text()
    finally:
        loader.kill()
        loader.wait()


def test_a_post_loader_that_waits_for_postgres_ends_when_it_is_told_to(hospital: Hospital, tmp_path: Path) -> None:
    deployment, _ = hospital
    log = tmp_path / "post-loader.log"
    loader = start_command(deployment, tmp_path, "post-loader")
    try:
        wait_until(lambda: "waiting for the database" in log.read_text() or loader.poll() is not None)
        loader.send_signal(signal.SIGTERM)
        assert loader.wait(60) == 0, log.read_text()
    finally:
        loader.kill()
        loader.wait()


def post_and_see(api: Api, key: str) -> None:
    """Post a Patient as soon as the API takes it, and wait until the API shows it."""
    records = [{"resourceType": "Patient", "id": key}]
    wait_until(lambda: api.post("/api/v1/ingest", json={"records": records}).status_code == 202)
    wait_until(lambda: api.get(f"/patients/{key}").status_code == 200)
