"""Visits are posted over HTTP or written to the bucket, loaded by Dagster's daemon under a consent policy, and found by
the API. All parts share one daemon and one API.
"""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fhir_assets.fhir.intake import visits_csv
from fhir_assets_tests.support.api import Api, api_process, api_settings
from fhir_assets_tests.support.daemon import wait_until
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.deployment_daemon import NEVER, daemon
from fhir_assets_tests.support.landing import LandingZone
from fhir_assets_tests.support.visits import visit

pytestmark = pytest.mark.slow

TYPES = ("Patient", "Encounter", "Consent")
NEW, CHANGING, OTHER, DENYING, SILENT = (f"MRN-{n}" for n in range(1, 6))


@dataclass
class Hospital:
    """The API, the deployment and the landing zone that all parts share."""

    api: Api
    deployment: Deployment
    zone: LandingZone
    ids: dict[str, str] = field(default_factory=dict)

    def post(self, rows: list[dict[str, str]]) -> str:
        answer = self.api.post("/ingest", json=rows, role="ingester")
        assert answer.status_code == 202, answer.text
        content = answer.json()
        assert content["records_received"] == len(rows)
        assert content["csv_filename"] in self.zone.names()
        return str(content["task_id"])

    def task(self, task_id: str) -> dict[str, Any]:
        answer = self.api.get(f"/ingest/tasks/{task_id}", role="ingester")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait(self, *tasks: str) -> None:
        wait_until(lambda: all(self.task(task)["status"] == "loaded" for task in tasks), seconds=240)

    def until_loaded(self, files: int) -> None:
        loaded = "SELECT FROM ops.landing_files WHERE status = 'loaded'"
        wait_until(lambda: len(self.deployment.query(loaded)) == files, seconds=240)
        wait_until(lambda: not self.deployment.query("SELECT FROM ops.received WHERE loaded_at IS NULL"), seconds=240)

    def rows_of(self, mrn: str) -> list[str]:
        tables = self.deployment.tables()
        return sorted(row for rows in tables.values() for row in rows if self.ids[mrn] in row)

    def find(self, mrn: str) -> list[dict[str, Any]]:
        return list(self.api.get(f"/patients?mrn={mrn}", role="reader").json()["patients"])


@pytest.fixture
def hospital(deploy: Deploy, tmp_path: Path, s3_url: str) -> Iterator[Hospital]:
    zone = LandingZone(s3_url)
    settings: dict[str, object] = {
        "fhir_landing_url": zone.url,
        "fhir_resource_types": ",".join(TYPES),
        "fhir_last_updated_gte": "2024-01-01",
        "consent_policy": "opt-in",
    }
    deployment = deploy(**settings)
    changed = {name.upper(): str(value) for name, value in settings.items()} | {"FHIR_SCHEDULE": NEVER}
    served = api_settings(deployment.url, tmp_path, {**settings, "fhir_assets_home": deployment.settings.home})
    with daemon(deployment, tmp_path / "daemon.log", **changed), api_process(served, tmp_path) as api:
        yield Hospital(api, deployment, zone)


def test_a_scripted_story_of_visits_ends_in_the_expected_tables(hospital: Hospital) -> None:
    """The parts share one test, because starting a daemon is slow."""
    people_consent_or_do_not(hospital)
    three = new_patients(hospital)
    no_consent_nothing_stored(hospital)
    changed_and_repeated(hospital, three)


def people_consent_or_do_not(hospital: Hospital) -> None:
    consents = {
        NEW: {"data_sharing": True},
        CHANGING: {"data_sharing": True},
        OTHER: {"data_sharing": True, "research": False},
        DENYING: {"data_sharing": False},
        SILENT: {"research": True},
    }
    records = [
        {
            "resourceType": "Patient",
            "mrn": mrn,
            "name": {"first": "Ada", "last": "Lovelace"},
            "birthDate": "1815-12-10",
            "consent": consent,
        }
        for mrn, consent in consents.items()
    ]
    answer = hospital.api.post("/api/v1/ingest", json={"records": records}, role="ingester").json()
    assert answer["accepted"] == 5
    hospital.ids = {mrn: result["id"] for mrn, result in zip(consents, answer["results"], strict=True)}


def new_patients(hospital: Hospital) -> list[dict[str, str]]:
    three = [visit(CHANGING, "V-2"), visit(CHANGING, "V-3", "Byron"), visit(OTHER, "V-4")]
    first = hospital.post([visit(NEW, "V-1", reason="fever")])
    second = hospital.post(three)
    third = hospital.post([visit(DENYING, "V-5"), visit(SILENT, "V-6")])
    hospital.wait(first, second, third)

    (patient,) = hospital.find(NEW)
    assert patient["id"] == hospital.ids[NEW]
    assert patient["person"]["last_name"] == "Lovelace"
    (seen,) = patient["visits"]
    assert (seen["visit_account_number"], seen["visit_date"], seen["reason"]) == ("V-1", "2024-01-05", "fever")

    counts = hospital.task(second)["counts"]
    assert (counts["patients"], counts["updates"], counts["visits"]) == (2, 1, 3)
    (changing,) = hospital.find(CHANGING)
    assert changing["person"]["last_name"] == "Byron"
    assert len(changing["visits"]) == 2
    assert hospital.api.get("/patients", role="reader").json()["total"] == 3
    return three


def no_consent_nothing_stored(hospital: Hospital) -> None:
    without = [hospital.ids[DENYING], hospital.ids[SILENT]]
    tables = {name: rows for name, rows in hospital.deployment.tables().items() if not name.startswith("consent")}
    assert {"patient", "encounter", "resource"} <= tables.keys()
    assert hospital.ids[NEW] in str(tables)
    stored = [row for rows in tables.values() for row in rows if any(identity in row for identity in without)]
    assert [row for row in stored if not row.startswith("(Consent,")] == []
    for identity in without:
        for path in (f"/patients/{identity}", f"/api/v1/patients/{identity}"):
            answer = hospital.api.get(path, role="reader")
            assert (answer.status_code, answer.json()["reason"]) == (403, "consent"), answer.text
    assert hospital.find(DENYING) == hospital.find(SILENT) == []


def changed_and_repeated(hospital: Hospital, three: list[dict[str, str]]) -> None:
    before = hospital.rows_of(CHANGING)
    again = hospital.post(three)
    hospital.zone.put("by-hand/again.csv.gz", gzip.compress(visits_csv.write(three)))
    married = hospital.post([visit(NEW, "V-7", "King"), visit(NEW, "V-1", "Wrong", reason="other")])
    hospital.zone.put("by-hand/next.csv", visits_csv.write([visit(OTHER, "V-8")]) + b"MRN-9,,,,,,\r\n")
    hospital.wait(again, married)
    hospital.until_loaded(7)

    assert before
    assert hospital.rows_of(CHANGING) == before
    assert hospital.task(again)["known_before"]
    by_hand = (
        "SELECT patients + updates + visits, repeats FROM ops.visit_files"
        " JOIN ops.landing_files ON origin = 'landing:' || sha256 WHERE starts_with(name, 'by-hand/again')"
    )
    assert hospital.deployment.query(by_hand) == [(0, 3)]

    (patient,) = hospital.find(NEW)
    assert patient["person"]["last_name"] == "King"
    assert {visit["visit_account_number"] for visit in patient["visits"]} == {"V-1", "V-7"}
    assert "fever" in {visit["reason"] for visit in patient["visits"]}
    (other,) = hospital.find(OTHER)
    assert len(other["visits"]) == 2
    task = hospital.task(married)
    assert (task["counts"]["updates"], task["counts"]["visits"], task["counts"]["conflicts"]) == (1, 1, 1)
    assert task["dead_letters"] == 1
    assert hospital.deployment.count_dead_letters() == {"visit-conflict": 1, "schema": 1}
    assert hospital.api.get("/patients", role="reader").json()["total"] == 3
