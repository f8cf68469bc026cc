"""Visit files and their ledger, with a real store, Postgres and threads, compared with a naive model."""

import gzip
import json
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fhir_assets.errors import StoreError
from fhir_assets.fhir.files import formats
from fhir_assets.fhir.files.formats import FileItem, LandedContent
from fhir_assets.fhir.intake import visits_csv
from fhir_assets.fhir.record import Deletion
from fhir_assets.pipeline.landing.step import LandingStep
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.storage.landing_zone import open_zone
from fhir_assets.storage.store import Store, open_store
from fhir_assets.warehouse.ops import landing_files, landing_reports, received, visits
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.warehouse.postgres.tables import deletions
from fhir_assets.windows import Granularity, WindowScheme
from fhir_assets_tests.support.visits import Row, visit

SCHEME = WindowScheme(Granularity.DAILY, datetime(2024, 1, 1, tzinfo=UTC), open_start=True)
NOW = datetime(2024, 1, 9, 12, tzinfo=UTC)


class VisitDeployment:
    """A landing zone, the step that receives its files, and the results in the store and the database."""

    def __init__(self, folder: Path, database: str, types: Sequence[str] = ("Patient", "Encounter")) -> None:
        self.url = database
        self.folder = folder / "landing"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store: Store = open_store(str(folder / "store"), NO_ENCRYPTION)
        receiver = Receiver(self.store, lambda: connect(database, cipher=NO_ENCRYPTION), SCHEME, types, now=lambda: NOW)
        zone = open_zone(str(self.folder), bucket=lambda url: pytest.fail(url))
        self.landing = LandingStep(
            zone, receiver, lambda: connect(database, cipher=NO_ENCRYPTION), max_bytes=1 << 20, now=lambda: NOW
        )

    def put(self, name: str, content: bytes | Sequence[Row], *, hours: int = 0) -> None:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else visits_csv.write(content))
        moment = (NOW - timedelta(hours=48) + timedelta(hours=hours)).timestamp()
        os.utime(path, (moment, moment))

    def receive(self) -> None:
        self.landing.scan(assume_complete=True)
        self.landing.run("run")

    def query(self, statement: str) -> list[tuple[object, ...]]:
        with connect(self.url) as conn:
            return conn.execute(statement).fetchall()

    def raw(self, resource_type: str) -> list[dict[str, Any]]:
        manifests = self.store.manifests("raw", resource_type, self.store.partition_keys("raw", resource_type))
        lines = (line for manifest in manifests for batch in self.store.batches(manifest.parts) for line in batch)
        return [json.loads(line) for line in lines]

    def names(self) -> dict[str, str]:
        """Return the last name in the newest version of each Patient, by MRN, as the tables would contain it."""
        newest: dict[str, tuple[tuple[str, int], str]] = {}
        for patient in self.raw("Patient"):
            (number,) = patient["identifier"]
            (name,) = patient["name"]
            meta = patient["meta"]
            order = meta["lastUpdated"], int(meta["versionId"])
            mrn = number["value"]
            newest[mrn] = max(newest.get(mrn, (order, "")), (order, name["family"]))
        return {mrn: name for mrn, (_, name) in newest.items()}

    def counts(self) -> dict[str, int]:
        names = ("patients", "updates", "outdated", "visits", "repeats", "conflicts")
        row = self.query(f"SELECT {', '.join(f'coalesce(sum({n}), 0)::int' for n in names)} FROM ops.visit_files")[0]
        return {name: int(str(count)) for name, count in zip(names, row, strict=True) if count}


@pytest.fixture
def deployment(tmp_path: Path, database: str) -> VisitDeployment:
    return VisitDeployment(tmp_path, database)


def test_a_person_with_two_names_in_a_file_is_one_patient_with_one_update(deployment: VisitDeployment) -> None:
    deployment.put("a.csv", [visit("1", "V1"), visit("1", "V2", "Byron"), visit("2", "V3")])
    deployment.receive()
    assert deployment.counts() == {"patients": 2, "updates": 1, "visits": 3}
    assert deployment.names() == {"1": "Byron", "2": "Lovelace"}
    encounters = deployment.raw("Encounter")
    patients = {patient["id"] for patient in deployment.raw("Patient")}
    assert len({encounter["id"] for encounter in encounters}) == 3
    assert {str(e["subject"]["reference"]).removeprefix("Patient/") for e in encounters} == patients


def test_known_rows_in_another_file_add_nothing(deployment: VisitDeployment) -> None:
    rows = [visit("1", "V1"), visit("2", "V2"), visit("1", "V3", "Byron")]
    deployment.put("a.csv", rows)
    deployment.receive()
    before = deployment.raw("Patient"), deployment.raw("Encounter")
    deployment.put("same.csv", rows, hours=1)
    deployment.put("packed.csv.gz", gzip.compress(visits_csv.write(rows)), hours=2)
    deployment.put("other.csv", [rows[1], rows[0], rows[2]], hours=3)
    deployment.receive()
    assert (deployment.raw("Patient"), deployment.raw("Encounter")) == before
    assert deployment.counts() == {"patients": 2, "updates": 1, "visits": 3, "repeats": 6, "outdated": 2}


def other(mrn: str, account: str) -> Row:
    """Return a visit of a person whose name and birth date differ from those that ``visit`` has."""
    return {**visit(mrn, account, "Other"), "birth_date": "1990-06-30"}


def dead(deployment: VisitDeployment) -> list[tuple[object, ...]]:
    return deployment.query("SELECT rule, count(*)::int FROM ops.dead_letters GROUP BY 1 ORDER BY 1")


def test_two_unknown_persons_with_one_number_in_a_file_are_both_dead_letters(deployment: VisitDeployment) -> None:
    deployment.put("a.csv", [visit("1", "V1"), other("1", "V2"), visit("1", "V3"), visit("2", "V4")])
    deployment.receive()
    assert deployment.names() == {"2": "Lovelace"}
    assert len(deployment.raw("Encounter")) == 1
    assert dead(deployment) == [("person-conflict", 3)]
    assert deployment.counts() == {"patients": 1, "visits": 1, "conflicts": 3}


@pytest.mark.parametrize("hours", [1, -1])
def test_another_person_with_the_number_of_a_known_one_is_never_merged(deployment: VisitDeployment, hours: int) -> None:
    deployment.put("a.csv", [visit("1", "V1")])
    deployment.receive()
    deployment.put("b.csv", [other("1", "V2"), visit("1", "V3")], hours=hours)
    deployment.receive()
    assert deployment.names() == {"1": "Lovelace"}
    assert {encounter["identifier"][0]["value"] for encounter in deployment.raw("Encounter")} == {"V1", "V3"}
    assert dead(deployment) == [("person-conflict", 1)]


def test_a_name_and_a_birth_date_that_change_one_after_the_other_are_updates(deployment: VisitDeployment) -> None:
    rows = [visit("1", "V1"), visit("1", "V2", "Other"), other("1", "V3")]
    for hour, row in enumerate(rows):
        deployment.put(f"{hour}.csv", [row], hours=hour)
        deployment.receive()
    assert deployment.names() == {"1": "Other"}
    assert deployment.counts() == {"patients": 1, "updates": 2, "visits": 3}


def test_a_person_of_an_older_version_learns_its_name_and_birth_date_with_the_next_row(
    deployment: VisitDeployment,
) -> None:
    deployment.put("a.csv", [visit("1", "V1")])
    deployment.receive()
    with connect(deployment.url) as conn:
        conn.execute("UPDATE ops.visit_persons SET name = '', birth = ''")
    deployment.put("b.csv", [visit("1", "V2")], hours=1)
    deployment.receive()
    deployment.put("c.csv", [other("1", "V3")], hours=2)
    deployment.receive()
    assert deployment.names() == {"1": "Lovelace"}
    assert dead(deployment) == [("person-conflict", 1)]


def test_empty_files_are_bad_and_other_suffixes_are_listed_as_ignored(deployment: VisitDeployment) -> None:
    for name in ("empty.csv", "empty.ndjson", "empty.json", "blank.json"):
        deployment.put(name, b"\n" if name == "blank.json" else b"")
    deployment.put("letter.xml", b"<Patient/>")
    deployment.put("table.xlsx", b"PK")
    deployment.put("good.csv", [visit("1", "V1")])
    deployment.put("good.csv.done", b"")
    deployment.receive()
    deployment.receive()
    with connect(deployment.url, cipher=NO_ENCRYPTION) as conn:
        files = landing_reports.list_files(conn, str(deployment.folder))
    assert {file["name"]: file["status"] for file in files if file["status"] != "loaded"} == {
        "letter.xml": "ignored",
        "table.xlsx": "ignored",
    }
    assert {file["name"] for file in files if file["bad"]} == {"empty.csv", "empty.ndjson", "empty.json", "blank.json"}


def test_a_file_is_read_once_its_suffix_is_known(deployment: VisitDeployment, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment.put("a.csv", [visit("1", "V1")])
    with monkeypatch.context() as patch:
        patch.setattr(formats, "SUFFIXES", (".ndjson",))
        deployment.receive()
    assert deployment.raw("Patient") == []
    deployment.receive()
    assert len(deployment.raw("Patient")) == 1


def test_a_known_visit_with_other_content_is_a_dead_letter_and_changes_no_patient(deployment: VisitDeployment) -> None:
    deployment.put("a.csv", [visit("1", "V1")])
    deployment.receive()
    changed = [visit("1", "V1", "Byron", reason="other"), visit("2", "V1"), visit("1", "V1", day="2024-01-06")]
    deployment.put("b.csv", [*changed, visit("3", "V3")], hours=1)
    deployment.receive()
    assert deployment.names() == {"1": "Lovelace", "3": "Lovelace"}
    assert deployment.counts() == {"patients": 2, "visits": 2, "conflicts": 3}
    dead_letters = deployment.query("SELECT stage, rule, path, message FROM ops.dead_letters ORDER BY path")
    assert [(stage, rule, str(path).split(":")[1]) for stage, rule, path, _ in dead_letters] == [
        ("fetch", "visit-conflict", line) for line in ("2", "3", "4")
    ]
    assert not any(word in str(dead_letters) for word in ("Byron", "V1", "other,"))


def test_bad_rows_are_dead_letters_with_all_their_issues_and_the_other_rows_are_received(
    deployment: VisitDeployment,
) -> None:
    good = visits_csv.write([visit("1", "V1")])
    deployment.put("a.csv", good + b"2,,Lovelace,1815-13-10,V2,2024-01-05,\r\n" + b'3,"\r\n' + good.splitlines()[1])
    deployment.receive()
    assert deployment.counts() == {"patients": 1, "visits": 1, "repeats": 1}
    dead_letters = deployment.query("SELECT rule, path, jsonb_array_length(issues) FROM ops.dead_letters ORDER BY path")
    assert [(rule, str(path).split(":")[1], n) for rule, path, n in dead_letters] == [
        ("schema", "3", 2),
        ("csv", "4", 1),
    ]


def test_a_bad_header_is_one_dead_letter_that_names_the_missing_columns(deployment: VisitDeployment) -> None:
    for name in "ab":
        deployment.put(f"{name}.csv", f"mrn,{name}\n1,2\n".encode())
    deployment.receive()
    dead_letters = deployment.query("SELECT rule, message FROM ops.dead_letters")
    assert [rule for rule, _ in dead_letters] == ["csv-header"] * 2
    assert all("the header lacks first_name, last_name" in str(message) for _, message in dead_letters)


def test_an_older_file_that_arrives_late_does_not_change_a_person_from_a_newer_file(
    deployment: VisitDeployment,
) -> None:
    deployment.put("a.csv", [visit("1", "V1", "Byron")], hours=1)
    deployment.receive()
    deployment.put("c.csv", [visit("1", "V2", "Byron")], hours=3)
    deployment.receive()
    deployment.put("b.csv", [visit("1", "V3", "Lovelace")], hours=2)
    deployment.receive()
    assert deployment.names() == {"1": "Byron"}
    assert deployment.counts() == {"patients": 1, "outdated": 1, "visits": 3}


def test_a_file_that_was_killed_before_it_was_recorded_is_received_again_without_duplicates(
    deployment: VisitDeployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment.put("a.csv", [visit("1", "V1"), visit("1", "V2", "Byron"), visit("2", "V3")])
    with monkeypatch.context() as patched:
        patched.setattr(received, "record", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            deployment.receive()
    assert len(deployment.raw("Encounter")) == 3
    assert deployment.counts() == {}
    deployment.receive()
    assert (len(deployment.raw("Patient")), len(deployment.raw("Encounter"))) == (3, 3)
    assert deployment.counts() == {"patients": 2, "updates": 1, "visits": 3}


def test_many_small_files_are_received_as_one_origin_and_recorded_one_by_one(deployment: VisitDeployment) -> None:
    files = {f"{n}.csv": [visit(f"{n}-{m}", f"V{n}-{m}") for m in range(n)] for n in range(1, 6)}
    for n, (name, rows) in enumerate(files.items()):
        deployment.put(name, visits_csv.write(rows) + b"bad\r\n" * (n == 3), hours=n)
    deployment.put("6.csv", visits_csv.write(files["5.csv"]), hours=7)
    deployment.receive()
    manifest = deployment.store.manifest("raw", "Encounter", deployment.store.partition_keys("raw", "Encounter")[0])
    assert manifest
    assert len(manifest.receipts) == 1
    recorded_files = deployment.query(
        "SELECT name, status, rows, rejected, known_before FROM ops.landing_files ORDER BY 1"
    )
    assert recorded_files == [
        *((f"{n}.csv", "loaded", 2 * n, int(n == 4), False) for n in range(1, 6)),
        ("6.csv", "loaded", 10, 0, True),
    ]
    bad = deployment.query("SELECT name FROM ops.landing_files JOIN ops.dead_letters ON origin = 'landing:' || sha256")
    assert bad == [("4.csv",)]


def test_an_interrupted_batch_is_received_again_separately_from_newer_files(
    deployment: VisitDeployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((received, "record"), (landing_files, "record_loaded")):
        deployment.put(f"{name}-a.csv", [visit(name, f"{name}-1")])
        deployment.put(f"{name}-b.csv", [visit(name, f"{name}-2", "Byron")], hours=1)
        with monkeypatch.context() as patched:
            patched.setattr(module, name, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                deployment.receive()
        deployment.put(f"{name}-c.csv", [visit(name, f"{name}-3", "King")], hours=2)
        deployment.receive()
    assert (len(deployment.raw("Patient")), len(deployment.raw("Encounter"))) == (6, 6)
    assert deployment.names() == {"record": "King", "record_loaded": "King"}
    assert deployment.counts() == {"patients": 2, "updates": 4, "visits": 6}
    assert deployment.query("SELECT DISTINCT status, known_before, rows FROM ops.landing_files") == [
        ("loaded", False, 2)
    ]


def test_an_unreadable_file_of_a_batch_is_recorded_as_failed_and_the_others_are_received(
    deployment: VisitDeployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        deployment.put(f"{name}.csv", [visit(name, f"V{name}")])
    deployment.landing.scan(assume_complete=True)
    (deployment.folder / "a.csv").unlink()
    read = formats.read

    def read_or_fail(name: str, content: LandedContent) -> Iterator[FileItem]:
        yield from read(name, content)
        if name == "b.csv":
            raise StoreError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(formats, "read", read_or_fail)
        landed = deployment.landing.run("run")
    assert (landed.files, landed.failed, landed.rows) == (3, 2, 2)
    assert deployment.query("SELECT name, status FROM ops.landing_files ORDER BY 1") == [
        ("a.csv", "failed"), ("b.csv", "failed"), ("c.csv", "loaded")
    ]  # fmt: skip
    assert list(deployment.names()) == ["c"]


def test_files_received_concurrently_give_one_patient_for_each_mrn_and_one_encounter_for_each_number(
    tmp_path: Path, database: str
) -> None:
    deployments = [VisitDeployment(tmp_path, database) for _ in range(6)]
    for number, deployment in enumerate(deployments):
        deployment.put(f"{number}.csv", [visit(str(n), f"V{n}") for n in random.Random(number).sample(range(30), 25)])
    deployments[0].landing.scan(assume_complete=True)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda deployment: deployment.landing.run("run"), deployments))
    for name in ("Patient", "Encounter"):
        ids = [resource["id"] for resource in deployments[0].raw(name)]
        assert len(ids) == len(set(ids)) == 30
    assert deployments[0].counts() == {"patients": 30, "visits": 30, "repeats": 120}


def test_the_ledger_contains_no_patient_data(deployment: VisitDeployment) -> None:
    deployment.put("a.csv", [visit("SECRET-1", "SECRET-2", "Secretname")])
    deployment.receive()
    tables = ("visit_persons", "visits", "visit_files", "received")
    ledger = str([deployment.query(f"SELECT t::text FROM ops.{name} t") for name in tables])
    assert "SECRET" not in ledger
    assert "Secret" not in ledger
    assert "1815" not in ledger


def test_deleted_resources_are_new_when_they_arrive_again(deployment: VisitDeployment) -> None:
    deployment.put("a.csv", [visit("1", "V1")])
    deployment.receive()
    (patient,), (encounter,) = deployment.raw("Patient"), deployment.raw("Encounter")
    deleted = [Deletion("Patient", str(patient["id"]), NOW), Deletion("Encounter", str(encounter["id"]), NOW)]
    deletions.apply_in_transaction(lambda: connect(deployment.url, cipher=NO_ENCRYPTION), deleted, run_id="test")
    deployment.put("b.csv", [visit("1", "V1"), visit("1", "V2")], hours=1)
    deployment.receive()
    assert deployment.counts() == {"patients": 2, "visits": 3}


def test_a_person_written_by_another_channel_is_changed_by_newer_visit_files_only(deployment: VisitDeployment) -> None:
    deployment.put("a.csv", [visit("1", "V1")])
    deployment.receive()
    (patient,) = deployment.raw("Patient")
    with connect(deployment.url) as conn:
        visits.record_elsewhere(conn, [patient["id"], "other"], NOW - timedelta(hours=46))
    deployment.put("b.csv", [visit("1", "V2")], hours=1)
    deployment.receive()
    assert deployment.counts() == {"patients": 1, "outdated": 1, "visits": 2}
    deployment.put("c.csv", [visit("1", "V3"), visit("1", "V4")], hours=3)
    deployment.receive()
    assert deployment.counts() == {"patients": 1, "outdated": 1, "updates": 1, "visits": 4}


rows = st.builds(
    visit,
    st.sampled_from("123"),
    st.sampled_from(["V1", "V2", "V3", "V4"]),
    st.sampled_from(["Lovelace", "Byron", "=King"]),
    reason=st.sampled_from(["", "fever"]),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 5), st.lists(rows, min_size=1, max_size=6)), max_size=5), st.data())
def test_any_files_in_any_order_give_the_same_resources_as_the_naive_model(
    database: str, tmp_path_factory: pytest.TempPathFactory, files: list[tuple[int, list[Row]]], data: st.DataObject
) -> None:
    with connect(database) as conn:
        conn.execute(
            "TRUNCATE ops.visit_persons, ops.visits, ops.visit_files, ops.received, ops.landing_files, ops.dead_letters"
        )
    deployment = VisitDeployment(tmp_path_factory.mktemp("visits"), database)
    people: dict[str, tuple[int, str]] = {}
    known: dict[str, tuple[str, str]] = {}
    conflicts = set()
    seen = set()
    for number, (hours, content) in enumerate(files):
        deployment.put(f"{number}.csv", content, hours=hours)
        if data.draw(st.booleans()):
            deployment.receive()
    # Waiting files are received in the order of their time, then of their name. The model below does the same.
    deployment.receive()
    received_files = deployment.query("SELECT name FROM ops.landing_files ORDER BY tried_at")
    for (name,) in received_files:
        hours, content = files[int(str(name).split(".")[0])]
        if visits_csv.write(content) in seen:
            continue
        seen.add(visits_csv.write(content))
        for row in content:
            content_of_visit = row["mrn"], row["reason"]
            if known.setdefault(row["visit_account_number"], content_of_visit) != content_of_visit:
                conflicts.add((hours, *row.values()))
                continue
            before = people.get(row["mrn"])
            if before is None or hours >= before[0]:
                people[row["mrn"]] = hours, row["last_name"]
    assert deployment.names() == {mrn: name for mrn, (_, name) in people.items()}
    encounters = {}
    patients = {p["id"]: p["identifier"][0]["value"] for p in deployment.raw("Patient")}
    for encounter in deployment.raw("Encounter"):
        number = encounter["identifier"][0]["value"]
        assert number not in encounters
        reason = encounter.get("reasonCode", [{"text": ""}])[0]["text"]
        encounters[number] = patients[encounter["subject"]["reference"].removeprefix("Patient/")], reason
    assert encounters == known
    assert bool(deployment.query("SELECT FROM ops.dead_letters")) == bool(conflicts)
