"""API and post loader are killed while posts arrive and a first load runs: every 202 is in the tables, once."""

import threading
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import requests

from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.api import Api, api_process, api_settings
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.posts import (
    TYPES,
    build_visit,
    count_pending,
    deploy_hospital,
    find_faults,
    is_running,
    kill,
    start_command,
    wait_until,
)

pytestmark = pytest.mark.slow

ROUNDS = 3
POSTS_PER_ROUND = 8


class Poster:
    """Posts one patient and one visit after the other, and remembers which were accepted."""

    def __init__(self) -> None:
        self.api: Api | None = None
        self.patients: set[str] = set()
        self.visits: set[int] = set()
        self.stopping = threading.Event()
        self.count = 0
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while not self.stopping.wait(0.02):
            if self.api is None:
                continue
            self.count += 1
            key = f"p-{self.count}"
            try:
                records = [{"resourceType": "Patient", "id": key}]
                if self.api.post("/api/v1/ingest", json={"records": records}).status_code == 202:
                    self.patients.add(key)
                if self.api.post("/ingest", json=[build_visit(self.count)]).status_code == 202:
                    self.visits.add(self.count)
            except requests.RequestException:
                continue  # The API was killed: nobody was told that the post was accepted.

    def accept(self, more: int) -> None:
        """Wait until so many more posts of each kind are accepted."""
        patients, visits = len(self.patients) + more, len(self.visits) + more
        wait_until(lambda: len(self.patients) >= patients and len(self.visits) >= visits)


def find_lost(deployment: Deployment, poster: Poster) -> tuple[set[str], int]:
    """Return the accepted patients that are not in the tables, and how many accepted visits are not."""
    stored = {key for (key,) in deployment.query("SELECT id FROM fhir.patient")}
    ((visits,),) = deployment.query(
        "SELECT count(DISTINCT f.csv_filename) FROM ops.visit_posts f"
        " JOIN ops.landing_files l ON l.name = f.csv_filename AND l.status = 'loaded'"
    )
    return poster.patients - stored, max(0, len(poster.visits) - visits)


def test_posts_survive_kills_of_the_api_and_of_the_loader_beside_a_first_load(deploy: Deploy, tmp_path: Path) -> None:
    end = datetime.now(UTC)
    start = end - timedelta(days=5)
    write_population(tmp_path / "population", Population(30, 3, 0.02, end=end, start=start))
    poster = Poster()
    with SandboxServer(tmp_path / "population") as server, ExitStack() as stack:
        deployment = deploy_hospital(
            deploy, tmp_path, fhir_base_url=server.url, fhir_last_updated_gte=f"{start:%Y-%m-%d}"
        )
        values = api_settings(deployment.url, tmp_path, {})
        values |= {
            "fhir_assets_home": deployment.settings.home,
            "fhir_last_updated_gte": f"{start:%Y-%m-%d}",
            "fhir_resource_types": ",".join(TYPES),
            "fhir_base_url": server.url,
        }
        api = stack.enter_context(api_process(values, tmp_path))
        loader = start_command(deployment, tmp_path, "post-loader")
        wait_until(lambda: is_running(deployment))
        load = start_command(deployment, tmp_path, "ingest")
        poster.api = api
        poster.thread.start()
        try:
            for _ in range(ROUNDS):
                poster.accept(POSTS_PER_ROUND)
                kill(loader)
                poster.accept(POSTS_PER_ROUND)
                loader = start_command(deployment, tmp_path, "post-loader")
                poster.accept(POSTS_PER_ROUND)
                assert api.process
                kill(api.process)
                api = stack.enter_context(api_process(values, tmp_path))
                poster.api = api
            poster.accept(POSTS_PER_ROUND)
        finally:
            poster.stopping.set()
            poster.thread.join()
        assert load.wait(300) == 0, (tmp_path / "ingest.log").read_text()
        wait_until(lambda: count_pending(deployment) == 0)
        kill(loader)
        assert find_lost(deployment, poster) == (set(), 0)
        assert find_faults(deployment) == []
        assert deployment.query("SELECT count(*) - count(DISTINCT id) FROM fhir.patient") == [(0,)]
        ((orphans,),) = deployment.query(
            "SELECT count(*) FROM ops.visits v WHERE NOT EXISTS (SELECT FROM fhir.encounter e WHERE e.id = v.id)"
        )
        assert orphans == 0
