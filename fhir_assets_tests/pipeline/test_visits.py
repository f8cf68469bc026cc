"""Visits and their ledger: real store, real Postgres, real threads; whatever the order, the model's end."""

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
from fhir_assets.warehouse.ops import landing_files, received, visits
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.warehouse.postgres.tables import deletions
from fhir_assets.windows import Granularity, WindowScheme
from fhir_assets_tests.support.visits import Row, visit

SCHEME = WindowScheme(Granularity.DAILY, datetime(2024, 1, 1, tzinfo=UTC), open_start=True)
NOW = datetime(2024, 1, 9, 12, tzinfo=UTC)


class World:
    """A landing zone, what receives from it, and what came of it."""

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
        lines = (line for each in manifests for batch in self.store.batches(each.parts) for line in batch)
        return [json.loads(line) for line in lines]

    def names(self) -> dict[str, str]:
        """By MRN the last name of the newest version, as the tables would have it."""
        found: dict[str, tuple[tuple[str, int], str]] = {}
        for patient in self.raw("Patient"):
            (number,) = patient["identifier"]
            (name,) = patient["name"]
            meta = patient["meta"]
            order = meta["lastUpdated"], int(meta["versionId"])
            mrn = number["value"]
            found[mrn] = max(found.get(mrn, (order, "")), (order, name["family"]))
        return {mrn: name for mrn, (_, name) in found.items()}

    def counts(self) -> dict[str, int]:
        names = ("patients", "updates", "outdated", "visits", "repeats", "conflicts")
        row = self.query(f"SELECT {', '.join(f'coalesce(sum({n}), 0)::int' for n in names)} FROM ops.visit_files")[0]
        return {name: int(str(count)) for name, count in zip(names, row, strict=True) if count}


@pytest.fixture
def world(tmp_path: Path, database: str) -> World:
    return World(tmp_path, database)


def test_three_records_of_two_patients_are_two_patients_one_update_and_three_visits(world: World) -> None:
    world.put("a.csv", [visit("1", "V1"), visit("1", "V2", "Byron"), visit("2", "V3")])
    world.receive()
    assert world.counts() == {"patients": 2, "updates": 1, "visits": 3}
    assert world.names() == {"1": "Byron", "2": "Lovelace"}
    encounters = world.raw("Encounter")
    patients = {patient["id"] for patient in world.raw("Patient")}
    assert len({encounter["id"] for encounter in encounters}) == 3
    assert {str(e["subject"]["reference"]).removeprefix("Patient/") for e in encounters} == patients


def test_the_same_again_in_whatever_file_brings_nothing(world: World) -> None:
    rows = [visit("1", "V1"), visit("2", "V2"), visit("1", "V3", "Byron")]
    world.put("a.csv", rows)
    world.receive()
    before = world.raw("Patient"), world.raw("Encounter")
    world.put("same.csv", rows, hours=1)
    world.put("packed.csv.gz", gzip.compress(visits_csv.write(rows)), hours=2)
    world.put("other.csv", [rows[1], rows[0], rows[2]], hours=3)
    world.receive()
    assert (world.raw("Patient"), world.raw("Encounter")) == before
    assert world.counts() == {"patients": 2, "updates": 1, "visits": 3, "repeats": 6, "outdated": 2}


def test_a_visit_that_comes_with_other_content_is_a_dead_letter_and_changes_nobody(world: World) -> None:
    world.put("a.csv", [visit("1", "V1")])
    world.receive()
    changed = [visit("1", "V1", "Byron", reason="other"), visit("2", "V1"), visit("1", "V1", day="2024-01-06")]
    world.put("b.csv", [*changed, visit("3", "V3")], hours=1)
    world.receive()
    assert world.names() == {"1": "Lovelace", "3": "Lovelace"}
    assert world.counts() == {"patients": 2, "visits": 2, "conflicts": 3}
    letters = world.query("SELECT stage, rule, path, message FROM ops.dead_letters ORDER BY path")
    assert [(stage, rule, str(path).split(":")[1]) for stage, rule, path, _ in letters] == [
        ("fetch", "visit-conflict", line) for line in ("2", "3", "4")
    ]
    assert not any(word in str(letters) for word in ("Byron", "V1", "other,"))


def test_bad_rows_are_dead_letters_with_all_their_problems_and_the_rest_is_received(world: World) -> None:
    good = visits_csv.write([visit("1", "V1")])
    world.put("a.csv", good + b"2,,Lovelace,1815-13-10,V2,2024-01-05,\r\n" + b'3,"\r\n' + good.splitlines()[1])
    world.receive()
    assert world.counts() == {"patients": 1, "visits": 1, "repeats": 1}
    letters = world.query("SELECT rule, path, jsonb_array_length(issues) FROM ops.dead_letters ORDER BY path")
    assert [(rule, str(path).split(":")[1], n) for rule, path, n in letters] == [("schema", "3", 2), ("csv", "4", 1)]


def test_a_bad_header_is_one_letter_that_names_what_is_missing(world: World) -> None:
    for name in "ab":
        world.put(f"{name}.csv", f"mrn,{name}\n1,2\n".encode())
    world.receive()
    letters = world.query("SELECT rule, message FROM ops.dead_letters")
    assert [rule for rule, _ in letters] == ["csv-header"] * 2
    assert all("the header lacks first_name, last_name" in str(message) for _, message in letters)


def test_an_older_file_that_comes_late_does_not_undo_what_a_newer_one_said(world: World) -> None:
    world.put("a.csv", [visit("1", "V1", "Byron")], hours=1)
    world.receive()
    world.put("c.csv", [visit("1", "V2", "Byron")], hours=3)
    world.receive()
    world.put("b.csv", [visit("1", "V3", "Lovelace")], hours=2)
    world.receive()
    assert world.names() == {"1": "Byron"}
    assert world.counts() == {"patients": 1, "outdated": 1, "visits": 3}


def test_a_receiving_that_dies_before_its_note_is_done_again_and_nothing_is_double_or_lost(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.put("a.csv", [visit("1", "V1"), visit("1", "V2", "Byron"), visit("2", "V3")])
    with monkeypatch.context() as patched:
        patched.setattr(received, "record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            world.receive()
    assert len(world.raw("Encounter")) == 3
    assert world.counts() == {}
    world.receive()
    assert (len(world.raw("Patient")), len(world.raw("Encounter"))) == (3, 3)
    assert world.counts() == {"patients": 2, "updates": 1, "visits": 3}


def test_many_small_files_are_received_as_one_and_each_is_told_by_itself(world: World) -> None:
    files = {f"{n}.csv": [visit(f"{n}-{m}", f"V{n}-{m}") for m in range(n)] for n in range(1, 6)}
    for n, (name, rows) in enumerate(files.items()):
        world.put(name, visits_csv.write(rows) + b"bad\r\n" * (n == 3), hours=n)
    world.put("6.csv", visits_csv.write(files["5.csv"]), hours=7)
    world.receive()
    manifest = world.store.manifest("raw", "Encounter", world.store.partition_keys("raw", "Encounter")[0])
    assert manifest
    assert len(manifest.receipts) == 1
    told = world.query("SELECT name, status, rows, rejected, known_before FROM ops.landing_files ORDER BY 1")
    assert told == [
        *((f"{n}.csv", "loaded", 2 * n, int(n == 4), False) for n in range(1, 6)),
        ("6.csv", "loaded", 10, 0, True),
    ]
    bad = world.query("SELECT name FROM ops.landing_files JOIN ops.dead_letters ON origin = 'landing:' || sha256")
    assert bad == [("4.csv",)]


def test_a_batch_that_died_comes_again_as_the_same_beside_what_came_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room, name in ((received, "record"), (landing_files, "record_loaded")):
        world.put(f"{name}-a.csv", [visit(name, f"{name}-1")])
        world.put(f"{name}-b.csv", [visit(name, f"{name}-2", "Byron")], hours=1)
        with monkeypatch.context() as patched:
            patched.setattr(room, name, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                world.receive()
        world.put(f"{name}-c.csv", [visit(name, f"{name}-3", "King")], hours=2)
        world.receive()
    assert (len(world.raw("Patient")), len(world.raw("Encounter"))) == (6, 6)
    assert world.names() == {"record": "King", "record_loaded": "King"}
    assert world.counts() == {"patients": 2, "updates": 4, "visits": 6}
    assert world.query("SELECT DISTINCT status, known_before, rows FROM ops.landing_files") == [("loaded", False, 2)]


def test_a_file_of_a_batch_that_cannot_be_read_is_named_and_the_others_go_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        world.put(f"{name}.csv", [visit(name, f"V{name}")])
    world.landing.scan(assume_complete=True)
    (world.folder / "a.csv").unlink()
    read = formats.read

    def changed(name: str, content: LandedContent) -> Iterator[FileItem]:
        yield from read(name, content)
        if name == "b.csv":
            raise StoreError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(formats, "read", changed)
        landed = world.landing.run("run")
    assert (landed.files, landed.failed, landed.rows) == (3, 2, 2)
    assert world.query("SELECT name, status FROM ops.landing_files ORDER BY 1") == [
        ("a.csv", "failed"), ("b.csv", "failed"), ("c.csv", "loaded")
    ]  # fmt: skip
    assert list(world.names()) == ["c"]


def test_files_received_at_once_keep_one_patient_an_mrn_and_one_visit_a_number(tmp_path: Path, database: str) -> None:
    worlds = [World(tmp_path, database) for _ in range(6)]
    for number, each in enumerate(worlds):
        each.put(f"{number}.csv", [visit(str(n), f"V{n}") for n in random.Random(number).sample(range(30), 25)])
    worlds[0].landing.scan(assume_complete=True)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda each: each.landing.run("run"), worlds))
    for name in ("Patient", "Encounter"):
        ids = [each["id"] for each in worlds[0].raw(name)]
        assert len(ids) == len(set(ids)) == 30
    assert worlds[0].counts() == {"patients": 30, "visits": 30, "repeats": 120}


def test_no_patient_data_stands_in_the_ledger_and_ids_do_not_tell_the_number(world: World) -> None:
    world.put("a.csv", [visit("SECRET-1", "SECRET-2", "Secretname")])
    world.receive()
    tables = ("visit_persons", "visits", "visit_files", "received")
    said = str([world.query(f"SELECT t::text FROM ops.{name} t") for name in tables])
    assert "SECRET" not in said
    assert "Secret" not in said
    assert "1815" not in said


def test_what_was_deleted_is_news_when_it_comes_again(world: World) -> None:
    world.put("a.csv", [visit("1", "V1")])
    world.receive()
    (patient,), (encounter,) = world.raw("Patient"), world.raw("Encounter")
    gone = [Deletion("Patient", str(patient["id"]), NOW), Deletion("Encounter", str(encounter["id"]), NOW)]
    deletions.apply_in_transaction(lambda: connect(world.url, cipher=NO_ENCRYPTION), gone, run_id="test")
    world.put("b.csv", [visit("1", "V1"), visit("1", "V2")], hours=1)
    world.receive()
    assert world.counts() == {"patients": 2, "visits": 3}


def test_what_another_door_said_of_a_person_is_not_taken_for_what_visits_said(world: World) -> None:
    world.put("a.csv", [visit("1", "V1")])
    world.receive()
    (patient,) = world.raw("Patient")
    with connect(world.url) as conn:
        visits.record_elsewhere(conn, [patient["id"], "other"], NOW - timedelta(hours=46))
    world.put("b.csv", [visit("1", "V2")], hours=1)
    world.receive()
    assert world.counts() == {"patients": 1, "outdated": 1, "visits": 2}
    world.put("c.csv", [visit("1", "V3"), visit("1", "V4")], hours=3)
    world.receive()
    assert world.counts() == {"patients": 1, "outdated": 1, "updates": 1, "visits": 4}


rows = st.builds(
    visit,
    st.sampled_from("123"),
    st.sampled_from(["V1", "V2", "V3", "V4"]),
    st.sampled_from(["Lovelace", "Byron", "=King"]),
    reason=st.sampled_from(["", "fever"]),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 5), st.lists(rows, min_size=1, max_size=6)), max_size=5), st.data())
def test_any_files_in_any_order_end_as_the_naive_model_does(
    database: str, tmp_path_factory: pytest.TempPathFactory, files: list[tuple[int, list[Row]]], data: st.DataObject
) -> None:
    with connect(database) as conn:
        conn.execute(
            "TRUNCATE ops.visit_persons, ops.visits, ops.visit_files, ops.received, ops.landing_files, ops.dead_letters"
        )
    world = World(tmp_path_factory.mktemp("world"), database)
    people: dict[str, tuple[int, str]] = {}
    known: dict[str, tuple[str, str]] = {}
    conflicts = set()
    seen = set()
    for number, (hours, content) in enumerate(files):
        world.put(f"{number}.csv", content, hours=hours)
        if data.draw(st.booleans()):
            world.receive()
    # What waits together is taken in the order of time, then of name: the model does the same below.
    world.receive()
    taken = world.query("SELECT name FROM ops.landing_files ORDER BY tried_at")
    for (name,) in taken:
        hours, content = files[int(str(name).split(".")[0])]
        if visits_csv.write(content) in seen:
            continue
        seen.add(visits_csv.write(content))
        for row in content:
            what = row["mrn"], row["reason"]
            if known.setdefault(row["visit_account_number"], what) != what:
                conflicts.add((hours, *row.values()))
                continue
            before = people.get(row["mrn"])
            if before is None or hours >= before[0]:
                people[row["mrn"]] = hours, row["last_name"]
    assert world.names() == {mrn: name for mrn, (_, name) in people.items()}
    found = {}
    patients = {p["id"]: p["identifier"][0]["value"] for p in world.raw("Patient")}
    for encounter in world.raw("Encounter"):
        number = encounter["identifier"][0]["value"]
        assert number not in found
        reason = encounter.get("reasonCode", [{"text": ""}])[0]["text"]
        found[number] = patients[encounter["subject"]["reference"].removeprefix("Patient/")], reason
    assert found == known
    assert bool(world.query("SELECT FROM ops.dead_letters")) == bool(conflicts)
