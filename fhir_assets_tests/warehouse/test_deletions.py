"""Deletions and versions in every order: the tables end the same."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import permutations

import pytest

from fhir_assets.warehouse.postgres import resources
from fhir_assets.warehouse.postgres.db.connections import Connection, Session
from fhir_assets.warehouse.postgres.tables import deletions
from fhir_assets.warehouse.postgres.tables.deletions import Deletion
from fhir_assets.warehouse.postgres.tables.view_tables import ensure_tables
from fhir_assets_tests.support import views
from fhir_assets_tests.support.views import PATIENTS, patient

Step = Callable[[], object]

NOON = datetime(2024, 1, 5, 12, tzinfo=UTC)


def at(hours: float) -> datetime:
    return NOON + timedelta(hours=hours)


def load(conn: Session, moment: datetime, *, version: str | None = None, family: str = "x") -> None:
    views.load(conn, patient("a", moment.isoformat(), version, name=[{"family": family}]))


def delete(
    conn: Session, moment: datetime, *, version: str | None = None, identity: str = "a"
) -> deletions.DeletionCounts:
    return deletions.apply(conn, [Deletion("Patient", identity, moment, version)], run_id="run")


def rows(conn: Connection) -> list[int]:
    return [
        conn.execute(f"SELECT count(*) FROM {name}").fetchall()[0][0]
        for name in ("fhir.patient", "fhir.patient_name", "fhir.resource WHERE resource IS NOT NULL")
    ]


@pytest.fixture(autouse=True)
def _tables(conn: Session) -> None:
    ensure_tables(conn, PATIENTS)
    conn.commit()


def test_a_deletion_takes_the_rows_of_all_views_and_leaves_a_tombstone_with_its_time(conn: Session) -> None:
    load(conn, at(0))
    found = delete(conn, at(1))
    assert (found.deleted, found.unknown, found.outdated) == ({"Patient": 1}, {}, {"Patient": 0})
    assert rows(conn) == [0, 0, 0]
    assert conn.execute("SELECT id, deleted_at, resource FROM fhir.resource").fetchall() == [("a", at(1), None)]
    assert resources.read(conn, "Patient", "a") is None
    assert list(resources.stream_type(conn, "Patient")) == []


def test_versions_and_a_deletion_end_the_same_in_every_order(conn: Session) -> None:
    steps: list[Step] = [
        lambda: load(conn, at(0)),
        lambda: load(conn, at(1)),
        lambda: delete(conn, at(2)),
    ]
    for order in permutations(steps):
        for step in (*order, *order):
            step()
        assert rows(conn) == [0, 0, 0]
        conn.execute("DELETE FROM fhir.resource")


def test_a_version_newer_than_the_deletion_brings_the_resource_back_in_every_order(conn: Session) -> None:
    steps: list[Step] = [
        lambda: load(conn, at(0)),
        lambda: delete(conn, at(1)),
        lambda: load(conn, at(2), family="new"),
    ]
    for order in permutations(steps):
        for step in (*order, *order):
            step()
        assert rows(conn) == [1, 1, 1]
        assert conn.execute("SELECT family, deleted_at FROM fhir.patient_name, fhir.resource").fetchall() == [
            ("new", None)
        ]
        conn.execute("TRUNCATE fhir.resource, fhir.patient, fhir.patient_name")


def test_of_one_instant_the_version_number_decides_and_without_one_the_deletion(conn: Session) -> None:
    load(conn, at(0), version="3")
    assert delete(conn, at(0), version="2").outdated == {"Patient": 1}
    delete(conn, at(0), version="4")
    assert rows(conn) == [0, 0, 0]
    load(conn, at(0), version="3")
    assert rows(conn) == [0, 0, 0]
    load(conn, at(0), version="5")
    assert rows(conn) == [1, 1, 1]
    delete(conn, at(0))
    assert rows(conn) == [0, 0, 0]


def test_a_deletion_before_the_resource_was_ever_seen_keeps_it_out(conn: Session) -> None:
    assert delete(conn, at(1)).unknown == {"Patient": 1}
    load(conn, at(0))
    assert rows(conn) == [0, 0, 0]
    assert delete(conn, at(1)).outdated == {"Patient": 1}


def test_a_deletion_is_a_record_of_the_audit_log_and_one_that_did_nothing_is_none(conn: Session) -> None:
    load(conn, at(0))
    delete(conn, at(1))
    delete(conn, at(1))
    found = conn.execute("SELECT action, resource_type, count, run_id FROM ops.audit_log").fetchall()
    assert found == [("delete", "Patient", 1, "run")]


def test_many_deletions_of_many_types_at_once_and_ids_that_no_table_can_hold(conn: Session) -> None:
    load(conn, at(0))
    many = [Deletion(name, f"r{n}", at(1)) for n in range(6000) for name in ("Patient", "Observation")]
    found = deletions.apply(
        conn, [*many, Deletion("Patient", "a", at(1)), Deletion("Patient", "x\0", at(1))], run_id="run"
    )
    assert (found.deleted, found.unknown) == ({"Patient": 1}, {"Patient": 6000, "Observation": 6000})
