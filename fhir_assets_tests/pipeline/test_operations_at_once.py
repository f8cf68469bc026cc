"""Every pair of operations at once on the resources of one window: nothing is lost, duplicated or left stale.

The pairs share one deployment; each has a window of its own. ``docs/concurrency.md`` lists them.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path

import psycopg
import pytest

from fhir_assets.errors import CorrectionRefused, DatabaseUnavailable, Overtaken
from fhir_assets.pipeline import partition_commit
from fhir_assets.pipeline.load.step import LoadStep
from fhir_assets.pipeline.receive import receiver
from fhir_assets.privacy.consent import ConsentGate, Policy
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.storage.blobs import LocalBlobs
from fhir_assets.warehouse.exports.export import Export
from fhir_assets.warehouse.lake import writer
from fhir_assets.warehouse.ops import (
    audit_log,
    consent_records,
    consents,
    corrections,
    encryption_secret,
    replays,
    retention,
    window_verdicts,
)
from fhir_assets.warehouse.postgres.db import migrations, schema_state
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.warehouse.postgres.tables import deletions, reencryption_batches, view_tables
from fhir_assets_tests.support.consent_records import consent, record
from fhir_assets_tests.support.databases import fresh_database
from fhir_assets_tests.support.interleaving import Killed, Point, interleave
from fhir_assets_tests.support.lake_rows import in_lake, in_table
from fhir_assets_tests.support.small_hospital import DAY, NotDone, SmallHospital, build_patient
from fhir_assets_tests.support.views import column, load, view

OLD_KEY, NEW_KEY = new_key(), new_key()
OPT_OUT = ConsentGate(Policy.OPT_OUT)
REFUSALS = (Overtaken, CorrectionRefused, NotDone)
"""The errors of an operation that did nothing and must be started again."""

MIGRATION_REFUSALS = (psycopg.errors.DeadlockDetected, DatabaseUnavailable)
"""A migration locks the tables that it changes, with all of their partitions: Postgres may end it, or the other one."""

_numbers = count()


@dataclass
class Case:
    """The window of one pair of operations, and the names of its patients."""

    hospital: SmallHospital
    number: int
    folder: Path

    def name(self, patient: str) -> str:
        """Return the id of a patient of this window."""
        return f"{patient}-{self.number}"

    def names(self, *patients: str) -> set[str]:
        """Return the ids of patients of this window."""
        return {self.name(patient) for patient in patients}

    def build(self, patient: str, **fields: object) -> dict[str, object]:
        """Return a patient of this window."""
        return build_patient(self.name(patient), day=self.hospital.day, **fields)  # type: ignore[arg-type]


def deny(case: Case) -> None:
    """Load the Consent by which ``denied`` withholds its data, and apply it."""
    denial = consent(f"c{case.number}", case.name("denied"), {"type": "deny"})
    with case.hospital.connect() as conn:
        load(conn, record(denial), views=tuple(v for v in case.hospital.views if v.resource_type == "Consent"))
        consent_records.record_loaded_consents(conn, by_file=False)
    case.hospital.apply_consent()


def change_views(case: Case) -> None:
    """Add a view of Patients, and load the window again, as an upgrade does."""
    hospital = case.hospital
    added = view(f"born_{case.number}", "Patient", column("born", "birthDate", "date"))
    hospital.views = (*hospital.views, added)
    with hospital.connect() as conn:
        view_tables.ensure_tables(conn, hospital.views)


def export(case: Case) -> None:
    """Export the Patients, and require that the file has each of them once."""
    hospital = case.hospital
    patients = next(each for each in hospital.views if each.name == "patient")
    folder = f"export-{case.number}"
    with (
        hospital.connect() as conn,
        Export(conn, hospital.store, LocalBlobs(case.folder), folder, actor="test", withholding=True) as files,
    ):
        of_type = files.for_type("Patient", [hospital.key])
        of_type.write_valid()
        of_type.write_table(patients, "csv")
        files.finish()
    lines = (case.folder / folder / "Patient.valid.ndjson").read_bytes().splitlines()
    ids = [json.loads(line)["id"] for line in lines]
    assert len(ids) == len(set(ids))


def update_lake(case: Case) -> None:
    """Update the folder of the table of Patients."""
    hospital = case.hospital
    patients = next(each for each in hospital.views if each.name == "patient")
    with hospital.connect() as conn:
        writer.update(conn, LocalBlobs(case.folder / "lake"), patients, [], run_id="lake", actor="test")


def migrate(case: Case) -> None:
    """Remove the table of a type without resources, and migrate, as an upgrade to a version with a new type does."""
    with case.hospital.connect() as conn, conn.transaction():
        schema_state.lock_schema(conn)
        conn.execute("DROP TABLE IF EXISTS fhir_partitions.resource_immunization")
    migrations.upgrade(case.hospital.url)


@dataclass(frozen=True)
class Operation:
    """An operation and the points at which it stops while the other one runs."""

    run: Callable[[Case], object]
    points: tuple[Point, ...] = ()


COMMITS = Point(partition_commit, "rewrite_partitions")
OPERATIONS = {
    "load": Operation(
        lambda case: case.hospital.load(f"load-{case.number}"),
        (COMMITS, Point(partition_commit, "resolve_dead_letters"), Point(LoadStep, "run"), Point(audit_log, "record")),
    ),
    "replay": Operation(
        lambda case: case.hospital.replay(f"replay-{case.number}"),
        (Point(replays, "stream_claimed"), COMMITS, Point(replays, "resolve_claimed")),
    ),
    "edit": Operation(
        lambda case: case.hospital.correct(case.name("edited"), gender="other"),
        (Point(corrections, "record"), Point(corrections, "record", after=True)),
    ),
    "discard": Operation(
        lambda case: case.hospital.discard(case.name("discarded")), (Point(replays, "discard", after=True),)
    ),
    "prune": Operation(lambda case: case.hospital.prune(), (Point(retention, "delete_expired_rows"),)),
    "rotation": Operation(
        lambda case: case.hospital.rotate(),
        (Point(reencryption_batches, "lock_resources", after=True), Point(reencryption_batches, "reencrypt_rows")),
    ),
    "consent": Operation(deny, (Point(consents, "update_decisions", after=True),)),
    "deletion": Operation(
        lambda case: case.hospital.delete(case.name("deleted")),
        (Point(deletions, "apply"), Point(deletions, "apply", after=True)),
    ),
    "receive": Operation(
        lambda case: case.hospital.receive(
            case.build("updated", version=2, gender="other"), origin=f"update:{case.number}"
        ),
        (Point(receiver, "rewrite_partitions"), Point(receiver, "rewrite_partitions", after=True)),
    ),
    "reading": Operation(lambda case: case.hospital.find_loaded()),
    "export": Operation(export, (Point(Export, "finish"),)),
    "lake": Operation(update_lake, (Point(writer.LakeFolder, "update", after=True),)),
    "migration": Operation(migrate, (Point(migrations, "_create_partitions", after=True),)),
    "new view": Operation(change_views, (Point(view_tables, "remove_loaded_parts", after=True),)),
}
MAIN_POINTS = {"load": 2, "replay": 1, "consent": 0, "deletion": 0, "migration": 0}
"""The operations that run first in the quick tests, each with one of its points."""

PAIRS = [
    pytest.param(
        first,
        number,
        second,
        id=f"{second} during {first} {number}",
        marks=() if MAIN_POINTS.get(first) == number else pytest.mark.slow,
    )
    for first, operation in OPERATIONS.items()
    for number in range(len(operation.points))
    for second in OPERATIONS
    if first != second
]
KILLED_PAIRS = [
    pytest.param(first, second, id=f"{second} during {first}")
    for first in ("load", "replay", "rotation", "consent", "deletion", "receive", "edit")
    for second in ("load", "replay", "rotation", "consent", "deletion", "receive", "prune")
    if first != second
]
"""Pairs of which the first operation is killed at its last point. The same operation twice has tests of its own."""


@pytest.fixture(scope="module")
def deployment(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The database and the folder of the one deployment."""
    with fresh_database(postgres) as url:
        yield url, tmp_path_factory.mktemp("operations")


@pytest.fixture
def case(deployment: tuple[str, Path]) -> Case:
    """A window whose data is encrypted with the old key. Operations encrypt with the new one.

    ``corrected``, ``edited`` and ``discarded`` are invalid, the other patients are loaded.
    """
    url, folder = deployment
    number = next(_numbers)
    with connect(url) as conn:
        old = encryption_secret.unlock(conn, Cipher(parse_keys([OLD_KEY, NEW_KEY])))
    hospital = SmallHospital(url, folder, cipher=old, gate=OPT_OUT, day=DAY + timedelta(days=number))
    case = Case(hospital, number, folder)
    valid = [case.build(name) for name in ("plain", "updated", "deleted", "denied")]
    invalid = [case.build(name, gender="wrong") for name in ("corrected", "edited", "discarded", "invalid")]
    hospital.receive(*valid, *invalid, origin=f"first:{number}")
    hospital.load(f"first-{number}")
    hospital.correct(case.name("corrected"), gender="female")
    with connect(url) as conn:
        hospital.cipher = encryption_secret.unlock(conn, Cipher(parse_keys([NEW_KEY, OLD_KEY])))
    hospital.store.cipher = hospital.cipher
    return case


def assert_nothing_is_lost(case: Case, operations: set[str]) -> None:
    """Assert that every patient is somewhere, and where the operations put it once the work that is due is done."""
    hospital = case.hospital
    everybody = case.names("plain", "updated", "deleted", "denied", "corrected", "edited", "discarded", "invalid")
    gone = case.names("deleted") if "deletion" in operations else set()
    places = hospital.find_loaded().keys() | hospital.find_unresolved() | hospital.find_withheld()
    assert places | gone == everybody
    if "receive" not in operations:
        assert hospital.count_window().faults == []
    hospital.extend(f"extension-{case.number}")
    hospital.replay(f"last-{case.number}")
    hospital.apply_consent()
    loaded = {case.name("plain"): "male", case.name("corrected"): "female"}
    loaded[case.name("updated")] = "other" if "receive" in operations else "male"
    unresolved = case.names("discarded", "invalid")
    if "edit" in operations:
        loaded[case.name("edited")] = "other"
    else:
        unresolved |= case.names("edited")
    if "deletion" not in operations:
        loaded[case.name("deleted")] = "male"
    if "consent" not in operations:
        loaded[case.name("denied")] = "male"
    assert hospital.find_loaded() == loaded
    assert hospital.find_unresolved() == unresolved
    assert hospital.find_withheld() == (case.names("denied") if "consent" in operations else set())
    assert hospital.find_dead_letter(case.name("discarded")).status == (
        "discarded" if "discard" in operations else "open"
    )
    counts = hospital.count_window()
    assert (counts.faults, counts.dead) == ([], len(unresolved))
    if "rotation" in operations:
        assert hospital.rotate() == 0
    if "lake" in operations:
        update_lake(case)
        with hospital.connect() as conn:
            held = window_verdicts.find_faults(conn, "Patient", [hospital.key])
            stored = in_table(conn, "patient")
        assert held or in_lake(str(case.folder / "lake"), "patient") == stored
    if "migration" in operations:
        schema_state.require_current(hospital.url)
    if "new view" in operations:
        with hospital.connect() as conn:
            rows = conn.execute(
                f"SELECT _resource_key FROM fhir.born_{case.number} WHERE _resource_key LIKE %s".encode(),
                [f"%-{case.number}"],
            )
            assert {key for (key,) in rows} == set(loaded)


@pytest.mark.parametrize(("first", "number", "second"), PAIRS)
def test_two_operations_at_once(
    case: Case, monkeypatch: pytest.MonkeyPatch, first: str, number: int, second: str
) -> None:
    one, other = OPERATIONS[first], OPERATIONS[second]
    outcome = interleave(
        case.hospital.url, monkeypatch, lambda: one.run(case), one.points[number], lambda: other.run(case)
    )
    refusals = (*REFUSALS, *MIGRATION_REFUSALS) if "migration" in (first, second) else REFUSALS
    for error, operation in zip(outcome.errors, (one, other), strict=True):
        if isinstance(error, refusals):
            operation.run(case)
        elif error is not None:
            raise error
    assert_nothing_is_lost(case, {first, second})


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), KILLED_PAIRS)
def test_one_of_two_operations_is_killed_and_repeated(
    case: Case, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    one, other = OPERATIONS[first], OPERATIONS[second]
    outcome = interleave(
        case.hospital.url, monkeypatch, lambda: one.run(case), one.points[-1], lambda: other.run(case), kill=True
    )
    assert isinstance(outcome.errors[0], Killed)
    if outcome.errors[1] is not None:
        raise outcome.errors[1]
    with suppress(CorrectionRefused):
        one.run(case)
    assert_nothing_is_lost(case, {first, second})
