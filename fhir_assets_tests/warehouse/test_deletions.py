"""Deletions: the tables have the same content for every order of versions and deletions."""

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


def test_a_deletion_removes_the_rows_of_all_views_and_stores_a_tombstone_with_its_time(conn: Session) -> None:
    load(conn, at(0))
    counts = delete(conn, at(1))
    assert (counts.deleted, counts.unknown, counts.outdated) == ({"Patient": 1}, {}, {"Patient": 0})
    assert rows(conn) == [0, 0, 0]
    assert conn.execute("SELECT id, deleted_at, resource FROM fhir.resource").fetchall() == [("a", at(1), None)]
    assert resources.read(conn, "Patient", "a") is None
    assert list(resources.stream_type(conn, "Patient")) == []


def test_a_resource_stays_deleted_for_every_order_of_older_versions_and_the_deletion(conn: Session) -> None:
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


def test_a_version_newer_than_the_deletion_restores_the_resource_in_every_order(conn: Session) -> None:
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


def test_at_equal_times_the_version_number_decides_or_else_the_deletion_wins(conn: Session) -> None:
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


def test_a_deletion_of_an_unknown_resource_prevents_the_load_of_an_older_version(conn: Session) -> None:
    assert delete(conn, at(1)).unknown == {"Patient": 1}
    load(conn, at(0))
    assert rows(conn) == [0, 0, 0]
    assert delete(conn, at(1)).outdated == {"Patient": 1}


def test_a_deletion_writes_an_audit_record_unless_it_had_no_effect(conn: Session) -> None:
    load(conn, at(0))
    delete(conn, at(1))
    delete(conn, at(1))
    audit_records = conn.execute("SELECT action, resource_type, count, run_id FROM ops.audit_log").fetchall()
    assert audit_records == [("delete", "Patient", 1, "run")]


def test_thousands_of_deletions_are_applied_and_ids_that_cannot_be_stored_are_ignored(conn: Session) -> None:
    load(conn, at(0))
    many = [Deletion(name, f"r{n}", at(1)) for n in range(6000) for name in ("Patient", "Observation")]
    counts = deletions.apply(
        conn, [*many, Deletion("Patient", "a", at(1)), Deletion("Patient", "x\0", at(1))], run_id="run"
    )
    assert (counts.deleted, counts.unknown) == ({"Patient": 1}, {"Patient": 6000, "Observation": 6000})
