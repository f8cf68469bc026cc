"""Random posts, files, consents and reads, and what must be true of the deployment after them."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from fhir_assets_tests.support.api import role_secret
from fhir_assets_tests.support.posts import build_visit
from fhir_assets_tests.support.soak.source import Source

_CSV_COLUMNS = ("mrn", "first_name", "last_name", "birth_date", "visit_account_number", "visit_date", "reason")
_WEIGHTS = {"post_patient": 30, "post_visits": 20, "change_patient": 15, "change_consent": 10, "read_patient": 20,
            "land_visits": 4, "create_at_source": 20}  # fmt: skip


@dataclass
class PostedPatient:
    """A patient as the API has accepted it last. ``uncertain``: a later post was sent and has no answer."""

    mrn: str
    id: str = ""
    version: int = 0
    shares: bool = True
    uncertain: bool = False


class Traffic:
    """One action after the other, chosen by a seed. ``faults`` are the sentences about what was not as it must be."""

    def __init__(self, url: str, landing: Path, source: Source, seed: int) -> None:
        self._url = url
        self._landing = landing
        self._source = source
        self._random = random.Random(seed)
        self._headers = {"Authorization": f"Bearer {role_secret('admin')}"}
        self._number = 0
        self.patients: list[PostedPatient] = []
        self.visits = 0
        self.uncertain_visits: list[list[dict[str, str]]] = []
        self.bad_rows = 0
        self.unanswered = 0
        self.faults: list[str] = []

    def act(self) -> None:
        """Do one random action."""
        [name] = self._random.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
        action: Callable[[], None] = getattr(self, name)
        action()

    def describe(self) -> str:
        """Return the numbers of what was done so far."""
        return (
            f"{len(self.patients)} patients, {self.visits} visits, {self.unanswered} calls without an answer, "
            f"{len(self.faults)} faults"
        )

    def settle(self) -> bool:
        """Send again what had no answer. Return whether nothing is left that has none."""
        for patient in self.patients:
            if patient.uncertain:
                self._post(patient, patient.shares)
        for visits in [*self.uncertain_visits]:
            self.uncertain_visits.remove(visits)
            self._send_visits(visits)
        return not self.uncertain_visits and not any(patient.uncertain for patient in self.patients)

    def post_patient(self) -> None:
        self._number += 1
        patient = PostedPatient(f"PERSON-{self._number}")
        self.patients.append(patient)
        self._post(patient, shares=True)

    def change_patient(self) -> None:
        if patient := self._choose():
            self._post(patient, patient.shares)

    def change_consent(self) -> None:
        if patient := self._choose():
            self._post(patient, not patient.shares)
            self._read(patient)

    def read_patient(self) -> None:
        if patient := self._choose():
            self._read(patient)

    def post_visits(self) -> None:
        self._send_visits([self._build_visit() for _ in range(self._random.randint(1, 3))])

    def land_visits(self) -> None:
        """Put a file of visits into the landing zone, sometimes with a row without a date."""
        visits = [self._build_visit() for _ in range(self._random.randint(1, 20))]
        if self._random.random() < 0.3:
            visits[-1] = visits[-1] | {"visit_date": "yesterday"}
            self.bad_rows += 1
            self.visits -= 1
        self.visits += len(visits)
        lines = [_CSV_COLUMNS, *([visit[name] for name in _CSV_COLUMNS] for visit in visits)]
        temporary = self._landing / f".{self._number}.tmp"
        temporary.write_text("".join(",".join(line) + "\n" for line in lines))
        temporary.rename(self._landing / f"visits-{self._number}.csv")

    def create_at_source(self) -> None:
        self._source.create_patient()

    def _choose(self) -> PostedPatient | None:
        return self._random.choice(self.patients) if self.patients else None

    def _build_visit(self) -> dict[str, str]:
        self._number += 1
        return build_visit(self._number)

    def _post(self, patient: PostedPatient, shares: bool) -> None:
        record = {
            "resourceType": "Patient",
            "mrn": patient.mrn,
            "name": f"Version{patient.version + 1} Example",
            "consent": {"data_sharing": shares},
        }
        patient.uncertain, patient.shares = True, shares
        patient.version += 1
        answer = self._call("POST", "/api/v1/ingest", {"records": [record]})
        if answer is None or answer.status_code >= 500:
            return
        patient.uncertain = False
        if answer.status_code != 202:
            self.faults.append(f"the post of a patient was answered with {answer.status_code}")
            return
        patient.id = answer.json()["results"][0]["id"]

    def _send_visits(self, visits: list[dict[str, str]]) -> None:
        answer = self._call("POST", "/ingest", visits)
        if answer is None or answer.status_code >= 500:
            self.uncertain_visits.append(visits)
        elif answer.status_code == 202:
            self.visits += len(visits)
        else:
            self.faults.append(f"the post of visits was answered with {answer.status_code}")

    def _read(self, patient: PostedPatient) -> None:
        """Read a patient. Before it is loaded it is unknown; if it does not share its data it is never shown."""
        if patient.uncertain or not patient.id:
            return
        answer = self._call("GET", f"/patients/{patient.id}")
        if answer is not None and answer.status_code == 200 and not patient.shares:
            self.faults.append(f"{patient.mrn} was shown after its denial had been accepted")
        elif answer is not None and answer.status_code not in (200, 403, 404, 503):
            self.faults.append(f"the read of a patient was answered with {answer.status_code}")

    def _call(self, method: str, path: str, body: Any = None) -> requests.Response | None:
        try:
            return requests.request(method, f"{self._url}{path}", json=body, headers=self._headers, timeout=60)
        except requests.RequestException:
            self.unanswered += 1
            return None
