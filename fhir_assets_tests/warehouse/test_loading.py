"""Loading into Postgres: the newest version of a resource is stored with all of its rows, in any order."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from threading import Barrier
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.fhir.record import Record
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.postgres.db.connections import Session, connect
from fhir_assets.warehouse.postgres.tables import loading as loader_module
from fhir_assets.warehouse.postgres.tables.loading import Loader
from fhir_assets.warehouse.postgres.tables.view_tables import ensure_tables
from fhir_assets_tests.support.views import (
    PATIENTS,
    build_rows,
    column,
    load,
    patient,
    select,
    view,
)

NAMES = "SELECT _resource_key, family FROM fhir.patient_name ORDER BY 1, 2"
STORED = "SELECT id, version_number, resource->>'gender' FROM fhir.resource ORDER BY 1"


def patient_with_families(key: str, *families: str, **more: Any) -> Record:
    return patient(key, name=[{"family": family} for family in families], **more)


def test_a_resource_is_written_to_fhir_resource_and_to_every_view(conn: Session) -> None:
    counts, bad = load(conn, patient_with_families("a", "One", "Two", gender="female"), patient_with_families("b"))
    assert (counts.inserted, counts.updated, counts.superseded, counts.unloadable, bad) == (2, 0, 0, 0, [])
    assert counts.rows == {("2024-01-01", "patient"): 2, ("2024-01-01", "patient_name"): 2}
    assert select(conn, NAMES) == [("a", "One"), ("a", "Two")]
    assert select(conn, STORED) == [("a", 1, "female"), ("b", 1, None)]
    assert select(conn, "SELECT DISTINCT partition_key, run_id FROM fhir.resource") == [("2024-01-01", "run")]


def test_values_are_typed_and_partial_dates_keep_their_precision(conn: Session) -> None:
    load(
        conn,
        patient("y", birthDate="1980", deceasedDateTime="2020-05"),
        patient("z", birthDate="1980-02-29", deceasedDateTime="2020-05-01T23:30:00.123-02:00", multipleBirthInteger=2),
    )
    rows = select(
        conn,
        "SELECT born::text, born_precision, died::text, died_precision, birth_order, pg_typeof(born)::text"
        " FROM fhir.patient ORDER BY _resource_key",
    )
    assert rows == [
        ("1980-01-01", "year", "2020-05-01 00:00:00+00", "month", None, "date"),
        ("1980-02-29", "day", "2020-05-02 01:30:00.123+00", "instant", 2, "date"),
    ]


def test_a_newer_version_replaces_all_rows_and_an_older_version_replaces_none(conn: Session) -> None:
    load(conn, patient_with_families("a", "Old", "Older"))
    newer = patient_with_families("a", "New", updated="2024-02-01T00:00:00Z", version="2")
    counts, _ = load(conn, newer)
    assert (counts.inserted, counts.updated, counts.superseded) == (0, 1, 0)
    counts, _ = load(conn, patient_with_families("a", "Late", "Old"))
    assert (counts.inserted, counts.updated, counts.superseded) == (0, 0, 1)
    assert select(conn, NAMES) == [("a", "New")]
    assert counts.rows == {}


def test_loading_twice_changes_nothing(conn: Session) -> None:
    records = [patient_with_families(f"p{n}", "A", "B", gender="male") for n in range(50)]
    load(conn, *records)
    before = [select(conn, query) for query in (NAMES, STORED)]
    load(conn, *records)
    assert [select(conn, query) for query in (NAMES, STORED)] == before


def test_loading_again_restores_deleted_rows(conn: Session) -> None:
    load(conn, patient_with_families("a", "One"))
    conn.execute("DELETE FROM fhir.patient_name")
    load(conn, patient_with_families("a", "One"))
    assert select(conn, NAMES) == [("a", "One")]


def test_versions_with_equal_times_are_ordered_by_numeric_version_id(conn: Session) -> None:
    load(conn, patient_with_families("a", "Ten", version="10"))
    counts, _ = load(conn, patient_with_families("a", "Nine", version="9"))
    assert counts.superseded == 1
    load(conn, patient_with_families("b", "Text", version="abc"), patient_with_families("c", "Huge", version="9" * 30))
    assert select(conn, NAMES) == [("a", "Ten"), ("b", "Text"), ("c", "Huge")]


def test_the_newest_version_within_a_load_is_stored_in_any_order(conn: Session) -> None:
    versions = [
        patient_with_families("a", f"V{n}", version=str(n), updated=f"2024-01-0{n}T00:00:00Z") for n in (2, 3, 1)
    ]
    counts, _ = load(conn, *versions)
    assert (counts.inserted, counts.superseded) == (1, 2)
    assert select(conn, NAMES) == [("a", "V3")]


def test_the_chunk_size_does_not_change_the_result(conn: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "CHUNK_RESOURCES", 3)
    records = [patient_with_families(f"p{n % 7}", f"V{n}", version=str(n)) for n in range(20)]
    counts, _ = load(conn, *records)
    assert counts.inserted == 7
    assert counts.inserted + counts.updated + counts.superseded == 20
    assert select(conn, NAMES) == [(f"p{n}", f"V{n + 14 if n < 6 else 13}") for n in range(7)]


def test_a_load_is_invisible_until_it_is_committed(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "CHUNK_RESOURCES", 2)
    with (
        connect(database, cipher=NO_ENCRYPTION) as conn,
        connect(database, autocommit=True, cipher=NO_ENCRYPTION) as other,
    ):
        ensure_tables(conn, PATIENTS)
        conn.commit()
        loader = Loader(conn, "Patient", PATIENTS, run_id="run")
        for n in range(5):
            loader.add([build_rows(PATIENTS, patient_with_families(f"p{n}", "A"))], "w")
        assert select(other, "SELECT count(*) FROM fhir.resource") == [(0,)]
        loader.finish()
        conn.rollback()
        assert select(other, "SELECT count(*) FROM fhir.patient_name") == [(0,)]


def test_writing_in_a_thread_has_the_same_result(conn: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "CHUNK_RESOURCES", 10)
    ensure_tables(conn, PATIENTS)
    records = [patient_with_families(f"p{n % 70}", f"V{n}", version=str(n)) for n in range(200)]
    refused = patient("bad", x=0)
    body = refused.body.replace(b": 0", b": 1e200000")
    records.insert(5, Record("Patient", "bad", "1", refused.last_updated, refused.arrived, body))
    bad = []
    with conn.transaction(), Loader(conn, "Patient", PATIENTS, run_id="run") as loader:
        for record in records:
            bad += loader.add([build_rows(PATIENTS, record)], "w")
        loader.wait()
        assert conn.execute("SELECT count(*) > 0 FROM fhir.resource").fetchone() == (True,)
        counts = loader.finish()
        bad += loader.take_unloadable()
    assert [resource.resource_id for resource in bad] == ["bad"]
    assert (counts.inserted, counts.unloadable) == (70, 1)
    assert select(conn, "SELECT count(*), count(DISTINCT _resource_key) FROM fhir.patient_name") == [(70, 70)]
    assert select(conn, "SELECT min(version_number), max(version_number) FROM fhir.resource") == [(130, 199)]


def test_a_caller_that_fails_during_a_write_rolls_back(conn: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "CHUNK_RESOURCES", 500)
    ensure_tables(conn, PATIENTS)
    conn.commit()
    items = [build_rows(PATIENTS, patient_with_families(f"p{n}", "A")) for n in range(600)]

    def fail_during_a_write() -> None:
        with conn.transaction(), Loader(conn, "Patient", PATIENTS, run_id="run") as loader:
            loader.add(items, "w")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_during_a_write()
    assert select(conn, "SELECT count(*) FROM fhir.resource") == [(0,)]


UNSTORABLE = {
    "NUL in the text of a column": {"gender": "a\0b"},
    "NUL elsewhere in the JSON": {"language": "a\0b"},
    "a date that the calendar lacks": {"birthDate": "2023-02-29"},
    "a time that the clock lacks": {"deceasedDateTime": "2023-02-28T25:00:00Z"},
    "the year 0": {"birthDate": "0000"},
    "an integer beyond 32 bits": {"multipleBirthInteger": 2**31},
    "half a surrogate pair": {"language": "\ud800"},
    "a number beyond numeric": {"x": 0},
    "an indexed text longer than a page": {"gender": "x" * 9000},
    "an indexed text whose bytes are too many": {"name": [{"family": "é" * 2000}]},
}


@pytest.mark.parametrize("more", UNSTORABLE.values(), ids=UNSTORABLE.keys())
def test_a_resource_that_postgres_cannot_store_is_returned_and_the_others_are_loaded(
    conn: Session, more: dict[str, Any]
) -> None:
    bad = patient("bad", **more)
    if "x" in more:
        bad = Record("Patient", "bad", "1", bad.last_updated, bad.arrived, bad.body.replace(b": 0", b": 1e200000"))
    ensure_tables(conn, PATIENTS)
    rows = ([tuple(more.get(name) for name in _PATIENT_FIELDS)], [(n["family"],) for n in more.get("name", ())])
    with conn.transaction():
        loader = Loader(conn, "Patient", PATIENTS, run_id="run")
        good = [build_rows(PATIENTS, patient_with_families(f"p{n}", "A")) for n in range(9)]
        unloadable = loader.add([*good[:5], (bad, rows), *good[5:]], "w")
        counts = loader.finish()
        unloadable += loader.take_unloadable()
    assert [(resource.resource_id, resource.partition_key) for resource in unloadable] == [("bad", "w")]
    assert (counts.inserted, counts.unloadable) == (9, 1)
    assert len(select(conn, NAMES)) == 9
    value = next(iter(more.values()))
    assert str(value) not in unloadable[0].message


_PATIENT_FIELDS = ("gender", "birthDate", "deceasedDateTime", "active", "multipleBirthInteger", "updated", "given")


def test_an_unloadable_value_names_its_view_and_column(conn: Session) -> None:
    _, bad = load(conn, patient("bad", birthDate="2023-02-29"))
    assert [(resource.view, resource.column) for resource in bad] == [("patient", "born")]


def test_resources_that_only_postgres_rejects_are_isolated_among_a_thousand(conn: Session) -> None:
    records = [patient_with_families(f"p{n:04}", "A", x=0) for n in range(1000)]
    for n in (0, 511, 999):
        record = records[n]
        body = record.body.replace(b": 0", b": 1e200000")
        records[n] = Record(
            record.resource_type, record.id, record.version_id, record.last_updated, record.arrived, body
        )
    counts, bad = load(conn, *records)
    assert {resource.resource_id for resource in bad} == {"p0000", "p0511", "p0999"}
    assert counts.inserted == 997
    assert all("1e200000" not in resource.message for resource in bad)


def test_decimals_keep_their_digits_in_columns_and_in_the_json(conn: Session) -> None:
    weights = view("weight", "Observation", column("value", "value.ofType(Quantity).value", "decimal"))
    body = b'{"resourceType": "Observation", "id": "o", "valueQuantity": {"value": 1.10}}'
    base = patient("o")
    load(conn, Record("Observation", "o", None, None, base.arrived, body), views=(weights,))
    assert select(conn, "SELECT value::text FROM fhir.weight") == [("1.10",)]
    assert select(conn, "SELECT resource->'valueQuantity'->>'value' FROM fhir.resource") == [("1.10",)]


def test_a_resource_type_outside_the_catalog_can_be_loaded(conn: Session) -> None:
    flags = view("flag", "Flag", column("status", "status", "code"))
    base = patient("f")
    body = b'{"resourceType": "Flag", "id": "f", "status": "active"}'
    counts, _ = load(conn, Record("Flag", "f", "1", None, base.arrived, body), views=(flags,))
    assert counts.inserted == 1
    assert select(conn, "SELECT resource_type FROM fhir.resource") == [("Flag",)]


def test_concurrent_loads_of_the_same_resources_store_the_newest_versions(database: str) -> None:
    """Each connection has the newer version of half of the resources; both start at the same time in every round."""
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        ensure_tables(conn, PATIENTS)
    rounds, size = 8, 60
    barrier = Barrier(2)

    def work(worker: int) -> int:
        done = 0
        with connect(database, cipher=NO_ENCRYPTION) as conn:
            for number in range(rounds):
                records = []
                for n in range(size):
                    version = 2 * number + (worker + n) % 2 + 1
                    records.append(patient_with_families(f"p{n}", f"V{version}", f"W{version}", version=str(version)))
                if worker:
                    records.reverse()
                items = [build_rows(PATIENTS, record) for record in records]
                barrier.wait()
                with conn.transaction():
                    loader = Loader(conn, "Patient", PATIENTS, run_id=f"run {worker}")
                    loader.add(items, "w")
                    counts = loader.finish()
                done += counts.inserted + counts.updated + counts.superseded
        return done

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (0, 1))) == [rounds * size] * 2
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        newest = f"V{2 * rounds}"
        assert select(conn, "SELECT family, count(*) FROM fhir.patient_name GROUP BY 1 ORDER BY 1") == [
            (newest, size),
            (newest.replace("V", "W"), size),
        ]
        assert select(conn, "SELECT count(*), min(version_number) FROM fhir.resource") == [(size, 2 * rounds)]


def test_a_load_waits_for_uncommitted_resources_of_another_load_and_merges_them(database: str) -> None:
    """The first load has not committed: the second load does not see its rows and must wait for them."""
    with (
        connect(database, cipher=NO_ENCRYPTION) as first,
        connect(database, cipher=NO_ENCRYPTION) as second,
        connect(database, autocommit=True, cipher=NO_ENCRYPTION) as other,
    ):
        ensure_tables(first, PATIENTS)
        first.commit()
        waiting = f"SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = {second.info.backend_pid}"
        with ThreadPoolExecutor(1) as pool:
            with first.transaction():
                load(
                    first,
                    patient_with_families("b", "Old", version="1"),
                    patient_with_families("c", "New", version="9"),
                )
                records = (
                    patient_with_families("a", "Only"),
                    patient_with_families("b", "Newer", version="2"),
                    patient_with_families("c", "Older", version="8"),
                )
                ending = pool.submit(load, second, *records)
                while select(other, waiting) == [(0,)]:
                    assert not ending.done()
                    time.sleep(0.01)
            counts, _ = ending.result()
        assert (counts.inserted, counts.updated, counts.superseded) == (1, 1, 1)
        assert select(second, NAMES) == [("a", "Only"), ("b", "Newer"), ("c", "New")]


def test_a_lost_connection_raises_database_unavailable_and_stores_no_resource(database: str) -> None:
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        ensure_tables(conn, PATIENTS)
    conn = connect(database, cipher=NO_ENCRYPTION)
    loader = Loader(conn, "Patient", PATIENTS, run_id="run")
    loader.add([build_rows(PATIENTS, patient_with_families("a", "One"))], "w")
    with connect(database, autocommit=True, cipher=NO_ENCRYPTION) as other:
        other.execute("SELECT pg_terminate_backend(%s)", [conn.info.backend_pid])
    with pytest.raises(DatabaseUnavailable, match="run it again"):
        loader.finish()
    with connect(database, cipher=NO_ENCRYPTION) as other:
        assert select(other, "SELECT count(*) FROM fhir.resource") == [(0,)]


@pytest.fixture
def prepared(database: str) -> Iterator[Session]:
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        ensure_tables(conn, TEXT_VIEW)
        conn.commit()
        yield conn


TEXT_VIEW = (
    view(
        "patient",
        "Patient",
        column("language", "language", "string"),
        column("given", "name.given", "string", collection=True),
        column("born", "birthDate", "date"),
    ),
)

_texts = st.text(st.characters(), max_size=12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(language=_texts, given_names=st.lists(_texts, min_size=1, max_size=3), born=st.text("0123456789-", max_size=11))
def test_any_text_is_stored_unchanged_or_reported_as_unloadable(
    prepared: Session, language: str, given_names: list[str], born: str
) -> None:
    """Backslashes, quotes, line ends, NUL and surrogates neither break a COPY nor are changed."""
    record = patient("p", language=language, name=[{"given": given_names}], birthDate=born)
    with prepared.transaction(force_rollback=True):
        loader = Loader(prepared, "Patient", TEXT_VIEW, run_id="run")
        bad = loader.add([(record, [[(language, given_names, born)]])], "w")
        loader.finish()
        bad += loader.take_unloadable()
        stored = select(prepared, "SELECT language, given, born_precision FROM fhir.patient")
        languages = select(prepared, "SELECT resource->>'language' FROM fhir.resource")
    storable = not any(_unstorable(text) for text in (language, *given_names))
    if not bad:
        assert storable
        precision = {4: "year", 7: "month", 10: "day"}[len(born)]
        assert stored == [(language, given_names, precision)]
        assert languages == [(language,)]
    else:
        assert stored == []
        assert not storable or not _is_date(born)


def _unstorable(text: str) -> bool:
    return "\0" in text or any("\ud800" <= character <= "\udfff" for character in text)


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat({4: f"{text}-01-01", 7: f"{text}-01", 10: text}[len(text)])
    except (ValueError, KeyError):
        return False
    return True
