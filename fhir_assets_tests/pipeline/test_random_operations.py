"""Operations on the resources of one window in a random order, two of them at once, against a model.

The model knows of each patient its newest version, its consent and whether it was deleted, and its row among those that
the connector delivers. After every step nobody who denies is in the tables. Once the work that is due is done, each
patient is in the tables, withheld or a dead letter, and each row is on the server, as the model says.
RANDOM_OPERATIONS=1000 tries so many plans; ``make test`` tries a few.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from fhir_assets.errors import CorrectionRefused, TransientError
from fhir_assets.privacy.consent import ConsentGate, Policy
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.warehouse.ops import encryption_secret
from fhir_assets.warehouse.postgres.db import migrations, schema_state
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.consent_records import consent
from fhir_assets_tests.support.databases import fresh_database
from fhir_assets_tests.support.interleaving import Killed, Point, interleave
from fhir_assets_tests.support.operation_points import POINTS
from fhir_assets_tests.support.patient_server import PatientServer
from fhir_assets_tests.support.small_hospital import DAY, NotDone, SmallHospital, build_patient
from fhir_assets_tests.support.source_rows import SourceRows

PLANS = int(os.environ.get("RANDOM_OPERATIONS", "3"))
NAMES = ("a", "b", "c", "d")
INVALID = "wrong"
GENDERS = ("male", "female", "other", INVALID)
KEYS = [new_key() for _ in range(3)]
REFUSALS = (TransientError, CorrectionRefused, NotDone)
"""The errors of an operation that did nothing and must be started again."""

WINDOWS = 200
"""The windows of one database, each of one plan."""

_plans, _runs = count(), count()


@dataclass
class Patient:
    """What was last said of a patient: ``gender`` by its newest version; ``validated`` is the last version tried.

    ``row`` is the family name of its row in schema ``health``.
    """

    version: int = 0
    validated: int = 0
    gender: str = ""
    corrected: str | None = None
    denied: bool = False
    consents: int = 0
    deleted: bool = False
    row: str | None = None


@dataclass(frozen=True)
class Operation:
    """What an operation does to the deployment, what it does to the model, and where it can be stopped."""

    run: Callable[[], object]
    told: Callable[[], None]
    points: tuple[Point, ...]


OPERATIONS = (*(name for name in POINTS if name != "consent"), "deny", "permit")
ALONE = {"delivery"}
"""Operations of which two at once would wait for each other: a connector runs until no change is left."""


def _nothing() -> None:
    """Nothing that the model would know."""


class Deployment(RuleBasedStateMachine):
    """One window of patients, in a deployment that many plans share: ``databases`` holds those that are open."""

    postgres: ClassVar[str]
    databases: ClassVar[ExitStack]
    server: ClassVar[PatientServer]
    url: ClassVar[str]
    folder: ClassVar[Path]
    begun = False

    @initialize()
    def begin(self) -> None:
        """Receive and load a first version of every patient."""
        self.number = next(_plans)
        day = self.number % WINDOWS
        if not day:
            type(self).url = self.databases.enter_context(fresh_database(self.postgres))
            SourceRows(self.url, self.folder, self.server).install()
        self.rotations = 0
        self.patients = {f"{name}-{self.number}": Patient() for name in NAMES}
        gate = ConsentGate(Policy.OPT_OUT)
        folder = self.folder / str(self.number // WINDOWS)
        folder.mkdir(exist_ok=True)
        self.hospital = SmallHospital(self.url, folder, gate=gate, day=DAY + timedelta(days=day))
        self.rows = SourceRows(self.url, folder, self.server)
        self.use_keys(KEYS)
        for name in self.patients:
            self.do(self.receive(name, "male"))
        self.do(self.load())
        self.begun = True

    # Operations

    def receive(self, name: str, gender: str) -> Operation:
        """A new version of a patient, as any channel hands it over."""
        patient = self.patients[name]
        version = patient.version + 1
        resource = build_patient(name, gender=gender, version=version, day=self.hospital.day)

        def told() -> None:
            patient.version, patient.gender, patient.corrected = version, gender, None

        origin = f"origin:{name}:{version}"
        return Operation(lambda: self.hospital.receive(resource, origin=origin), told, POINTS["receive"])

    def load(self) -> Operation:
        """What is new in the window."""
        return self.validating(lambda: self.hospital.extend(self.run_id()), POINTS["load"])

    def refresh(self) -> Operation:
        """The whole window again."""
        return self.validating(lambda: self.hospital.load(self.run_id()), POINTS["refresh"])

    def validating(self, run: Callable[[], object], points: tuple[Point, ...]) -> Operation:
        """An operation that validates every version that was received before it began."""
        versions = {name: patient.version for name, patient in self.patients.items()}

        def told() -> None:
            for name, version in versions.items():
                self.patients[name].validated = version

        return Operation(run, told, points)

    def replay(self) -> Operation:
        """All open dead letters."""
        return Operation(lambda: self.hospital.replay(self.run_id()), _nothing, POINTS["replay"])

    def edit(self, name: str) -> Operation:
        """A correction of the newest version of a patient, if that has a dead letter."""
        patient, version = self.patients[name], self.patients[name].version
        corrected: list[int] = []

        def run() -> None:
            if patient.validated == version and self.find_open_letter(name):
                self.hospital.correct(name, gender="unknown", version=version)
                corrected.append(version)

        def told() -> None:
            if patient.version in corrected:
                patient.corrected = "unknown"

        return Operation(run, told, POINTS["edit"])

    def discard(self, name: str) -> Operation:
        """The dismissal of the dead letter of a patient, if there is one."""

        def run() -> None:
            if self.find_open_letter(name):
                self.hospital.discard(name)

        return Operation(run, _nothing, POINTS["discard"])

    def delete(self, name: str) -> Operation:
        """The deletion of a patient, later than all of its versions."""

        def told() -> None:
            self.patients[name].deleted = True

        return Operation(lambda: self.hospital.delete(name), told, POINTS["deletion"])

    def decide(self, name: str, *, deny: bool) -> Operation:
        """A Consent of a patient, loaded and applied."""
        patient = self.patients[name]
        version = patient.consents + 1
        decision = consent(f"consent-{name}", name, {"type": "deny" if deny else "permit"}, version=version)
        moment = self.hospital.day + timedelta(hours=2, minutes=version)
        decision |= {"category": [{"text": "privacy"}], "policyRule": {"text": "opt-out"}}
        decision["meta"]["lastUpdated"] = moment.isoformat()

        def run() -> None:
            self.hospital.receive(decision, origin=f"consent:{name}:{version}")
            self.hospital.load_consents(self.run_id())
            self.hospital.apply_consent()

        def told() -> None:
            patient.consents, patient.denied = version, deny

        return Operation(run, told, POINTS["consent"])

    def rotate(self) -> Operation:
        """A new key, and the re-encryption with it."""

        def run() -> None:
            self.hospital.rotate()

        self.rotations += 1
        first = self.rotations % len(KEYS)
        self.use_keys([*KEYS[first:], *KEYS[:first]])
        return Operation(run, _nothing, POINTS["rotation"])

    def migrate(self) -> Operation:
        """An upgrade that creates a table."""

        def run() -> None:
            with self.hospital.connect() as conn, conn.transaction():
                schema_state.lock_schema(conn)
                conn.execute("DROP TABLE IF EXISTS fhir_partitions.resource_immunization")
            migrations.upgrade(self.url)

        return Operation(run, _nothing, POINTS["migration"])

    def prune(self) -> Operation:
        """Resolved dead letters and files that nothing refers to are removed."""
        return Operation(self.hospital.prune, _nothing, POINTS["prune"])

    def change_row(self, name: str, family: str) -> Operation:
        """A row of a patient that the connector must deliver, or without ``family`` the end of the row."""
        patient = self.patients[name]
        row = None if family == INVALID else family

        def told() -> None:
            patient.row = row

        return Operation(lambda: self.rows.change(name, row), told, POINTS["row"])

    def deliver(self) -> Operation:
        """The deliveries that are due."""
        return Operation(lambda: self.rows.deliver(self.hospital.connect), _nothing, POINTS["delivery"])

    def build(self, name: str, patient: str, gender: str) -> Operation:
        """Return the operation of a name."""
        match name:
            case "row":
                return self.change_row(patient, gender)
            case "delivery":
                return self.deliver()
            case "receive":
                return self.receive(patient, gender)
            case "edit":
                return self.edit(patient)
            case "discard":
                return self.discard(patient)
            case "deletion":
                return self.delete(patient)
            case "deny" | "permit":
                return self.decide(patient, deny=name == "deny")
            case "rotation":
                return self.rotate()
            case "migration":
                return self.migrate()
            case _:
                operation: Operation = getattr(self, name)()
                return operation

    # Steps

    @rule(name=st.sampled_from(OPERATIONS), patient=st.sampled_from(NAMES), gender=st.sampled_from(GENDERS))
    def one(self, name: str, patient: str, gender: str) -> None:
        """One operation alone."""
        self.do(self.build(name, f"{patient}-{self.number}", gender))

    @rule(
        names=st.tuples(st.sampled_from(OPERATIONS), st.sampled_from(OPERATIONS)),
        patients=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)),
        genders=st.tuples(st.sampled_from(GENDERS), st.sampled_from(GENDERS)),
        point=st.integers(0, 3),
        kill=st.booleans(),
    )
    def two_at_once(
        self,
        names: tuple[str, str],
        patients: tuple[str, str],
        genders: tuple[str, str],
        point: int,
        kill: bool,
    ) -> None:
        """Two operations at once; the first one may be killed, and is then repeated."""
        kinds = {"consent" if name in ("deny", "permit") else name for name in names}
        if kinds <= ALONE or (len(kinds) == 1 and patients[0] == patients[1]):
            return  # Two versions of one resource with the same number: nobody can say which is the newer one.
        first, second = (
            self.build(name, f"{patient}-{self.number}", gender)
            for name, patient, gender in zip(names, patients, genders, strict=True)
        )
        with pytest.MonkeyPatch.context() as patch:
            outcome = interleave(
                self.url,
                patch,
                first.run,
                first.points[point % len(first.points)],
                second.run,
                kill=kill,
                always=False,
            )
        for error, operation in zip(outcome.errors, (first, second), strict=True):
            if isinstance(error, (*REFUSALS, Killed)):
                note(f"again after {error!r}")
                self.do(operation)
            elif error is not None:
                raise error
            else:
                operation.told()

    def do(self, operation: Operation) -> None:
        """Run an operation alone, and tell the model."""
        operation.run()
        operation.told()

    @invariant()
    def nobody_who_denies_is_shown(self) -> None:
        """Nobody who denies is in the tables, however a consent and a load met."""
        assert not [name for name in self.hospital.find_loaded() if self.patients[name].denied]

    @rule()
    def settle(self) -> None:
        """Do the work that is due, and compare everything with the model."""
        self.do(self.load())
        self.do(self.replay())
        self.do(self.deliver())
        self.hospital.apply_consent()
        loaded, unresolved = self.hospital.find_loaded(), self.hospital.find_unresolved()
        withheld = self.hospital.find_withheld()
        for name, patient in self.patients.items():
            note(f"{name}: {patient}")
            gender = patient.corrected or patient.gender
            if patient.deleted:
                assert name not in loaded
            elif gender == INVALID:
                assert name in unresolved
            elif patient.denied:
                assert name in withheld
                assert name not in loaded
            else:
                assert loaded.get(name) == gender
        assert self.hospital.count_window().faults == []
        delivered = self.rows.find_delivered()
        assert {name: delivered.get(name) for name in self.patients} == {
            name: patient.row for name, patient in self.patients.items()
        }

    def teardown(self) -> None:
        """Compare at the end of each plan, too."""
        if self.begun:
            self.settle()

    # The deployment

    def run_id(self) -> str:
        """Return the id of a new run."""
        return f"run-{next(_runs)}"

    def find_open_letter(self, name: str) -> bool:
        """Return whether a patient has one dead letter that a person may work on."""
        statuses = [letter.status for letter in self.hospital.find_dead_letters() if letter.resource_id == name]
        return statuses == ["open"]

    def use_keys(self, keys: list[str]) -> None:
        """Encrypt with the first key from now on, and read what any of them has encrypted."""
        with connect(self.url) as conn:
            self.hospital.cipher = encryption_secret.unlock(conn, Cipher(parse_keys(keys)))
        self.hospital.store.cipher = self.hospital.cipher


@pytest.fixture(scope="module")
def deployment(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[Deployment]]:
    """The state machine on databases and a folder of its own."""
    with ExitStack() as databases, PatientServer() as server:
        Deployment.postgres, Deployment.databases, Deployment.server = postgres, databases, server
        Deployment.folder = tmp_path_factory.mktemp("operations")
        yield Deployment


@pytest.mark.timeout(300 + 60 * PLANS)
def test_random_operations_lose_nothing(deployment: type[Deployment]) -> None:
    run_state_machine_as_test(
        deployment,
        settings=settings(max_examples=PLANS, stateful_step_count=10, suppress_health_check=list(HealthCheck)),
    )
