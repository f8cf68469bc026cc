"""Search, update, create, delete, history and bulk exports against a real HAPI server (`make hapi-story`).

After every round, the ids and versions in the tables are compared with those that the server itself returns.
"""

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fhir_assets.ingestion.outcome import Outcome
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets_tests.support import hapi as hapi_server
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.hapi import Hapi, Versions, writing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hapi_server.SOURCE.exists(), reason="there is no ../shared/hapi: make hapi"),
]
TYPES = ("Patient", "Observation")
PATIENTS = 40


@pytest.fixture(scope="module", autouse=True)
def data(hapi: Hapi) -> None:
    """Patients and their observations."""
    hapi.put_all([patient(f"p{n}") for n in range(PATIENTS)])
    hapi.put_all([observation(f"o{n}", f"p{n % PATIENTS}") for n in range(3 * PATIENTS)])


def patient(resource_id: str, **content: object) -> dict[str, Any]:
    return {"resourceType": "Patient", "id": resource_id, "gender": "female", **content}


def observation(resource_id: str, patient_id: str, value: float = 1) -> dict[str, Any]:
    return {
        "resourceType": "Observation",
        "id": resource_id,
        "status": "final",
        "code": {"text": "test"},
        "subject": {"reference": f"Patient/{patient_id}"},
        "valueQuantity": {"value": value},
    }


def deployed(deploy: Deploy, server: Hapi, **settings: object) -> Deployment:
    values = {"fhir_resource_types": TYPES, "fhir_partition": "monthly", "fhir_deletes": "history", **settings}
    defaults = {"fhir_base_url": server.url, "fhir_overlap_seconds": 60, "fhir_page_size": 50, "fhir_workers": 1}
    return deploy(**{**defaults, **values})


def stored(deployment: Deployment) -> Versions:
    rows = deployment.query("SELECT resource_type, id, version_id FROM fhir.resource WHERE deleted_at IS NULL")
    versions = {(resource_type, resource_id): version for resource_type, resource_id, version in rows}
    shown = {("Patient", resource_id) for (resource_id,) in deployment.query("SELECT id FROM fhir.patient")}
    assert shown == {key for key in versions if key[0] == "Patient"}
    return versions


def load(deployment: Deployment, server: Hapi, **options: Any) -> None:
    """Load, expect that every check is green, and compare the tables with the server."""
    outcomes = deployment.ingest(**options)
    assert outcomes
    assert all(outcome.success for outcome in outcomes)
    assert [deployment.unreconciled(outcome) for outcome in outcomes] == [[]] * len(outcomes)
    assert stored(deployment) == server.read_versions(*TYPES)


class Writer:
    """Writes to a server at random: updates, new resources with ids of the server, deletions, and ids that return."""

    def __init__(self, server: Hapi, seed: int) -> None:
        self._server = server
        self._random = random.Random(seed)
        self._own: list[str] = []
        self.writes = 0

    def write(self) -> None:
        """Make one write, and pause."""
        choose = self._random.random()
        if choose < 0.4:
            number = self._random.randrange(3 * PATIENTS)
            self._server.put(observation(f"o{number}", f"p{number % PATIENTS}", round(choose * 10, 3)))
        elif choose < 0.6:
            self._own.append(self._server.create(observation("", "p0") | {"id": None})["id"])
        elif choose < 0.8 and self._own:
            self._server.delete("Observation", self._own.pop(0))
        else:
            resource_id = f"comes-and-goes-{self._random.randrange(5)}"
            self._server.put(observation(resource_id, "p1", round(choose, 3)))
            if choose > 0.85:
                self._server.delete("Observation", resource_id)
        self.writes += 1
        time.sleep(0.02)


def test_updates_creations_and_deletions_arrive_by_search_and_history(deploy: Deploy, hapi: Hapi) -> None:
    deployment = deployed(deploy, hapi)
    load(deployment, hapi)
    hapi.put(patient("p0", gender="male"))
    created = hapi.create({"resourceType": "Observation", "status": "final", "code": {"text": "new"}})
    for number in range(3):
        hapi.delete("Observation", f"o{number}")
    hapi.put(observation("o0", "p0", 5))
    load(deployment, hapi)
    hapi.delete("Observation", created["id"])
    hapi.put(observation("o1", "p1", 6))
    hapi.delete("Observation", "o1")
    load(deployment, hapi)
    assert deployment.query("SELECT gender FROM fhir.patient WHERE id = 'p0'") == [("male",)]
    gone = deployment.query("SELECT id FROM fhir.resource WHERE deleted_at IS NOT NULL AND id LIKE 'o%%' ORDER BY id")
    assert [resource_id for (resource_id,) in gone] == ["o1", "o2"]


def test_nothing_is_missing_after_loads_during_which_others_write(deploy: Deploy, hapi: Hapi) -> None:
    deployment = deployed(deploy, hapi)
    writer = Writer(hapi, 1)
    with writing(writer.write):
        for _ in range(3):
            outcomes = deployment.ingest()
            assert all(outcome.success for outcome in outcomes)
            assert [deployment.unreconciled(outcome) for outcome in outcomes] == [[]] * len(outcomes)
    assert writer.writes > 20
    load(deployment, hapi)


def test_nothing_is_missing_after_the_server_was_killed_during_a_load(deploy: Deploy, hapi: Hapi) -> None:
    hapi.put_all([patient(f"killed-{n}") for n in range(PATIENTS)])
    outcomes: list[Outcome] = []
    with hapi.relay() as relay:
        address = f"http://127.0.0.1:{relay.port}/fhir"
        deployment = deployed(deploy, hapi, fhir_base_url=address, fhir_page_size=2, fhir_max_attempts=2)
        thread = threading.Thread(target=lambda: outcomes.extend(deployment.ingest()))
        thread.start()
        while thread.is_alive() and relay.sent < 20:
            time.sleep(0.01)
        hapi.kill()
        thread.join()
        assert outcomes
        assert not all(outcome.success for outcome in outcomes)
        hapi.start()
        load(deployment, hapi)


def test_bulk_exports_and_the_history_arrive_and_a_full_refresh_too(deploy: Deploy, hapi: Hapi) -> None:
    deployment = deployed(deploy, hapi, fhir_source="bulk", fhir_bulk_fresh_minutes=0)
    load(deployment, hapi)
    hapi.put(observation("o9", "p9", 7))
    hapi.delete("Observation", "o10")
    load(deployment, hapi)
    hapi.delete("Observation", "o11")
    deployment = deployed(deploy, hapi, fhir_source="bulk", fhir_bulk_fresh_minutes=0, fhir_deletes="off")
    load(deployment, hapi, refresh=Refresh.FULL)


def test_a_full_refresh_by_search_removes_what_the_server_deleted(deploy: Deploy, hapi: Hapi) -> None:
    deployment = deployed(deploy, hapi, fhir_deletes="off")
    load(deployment, hapi)
    for number in range(20, 30):
        hapi.delete("Observation", f"o{number}")
    load(deployment, hapi, refresh=Refresh.FULL)


def test_versions_are_compared(hapi: Hapi, tmp_path: Path) -> None:
    """The comparison of this story sees a single version."""
    before = hapi.read_versions("Patient")
    hapi.put(patient("p2", birthDate="1980-01-01"))
    assert hapi.read_versions("Patient") == before | {("Patient", "p2"): "2"}
