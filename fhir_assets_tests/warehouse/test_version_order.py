"""The order of versions: which version of a resource the tables contain, in whatever order versions are loaded."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import permutations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fhir_assets.fhir.record import Deletion, Record
from fhir_assets.warehouse.postgres.db.connections import Session
from fhir_assets.warehouse.postgres.tables import deletions
from fhir_assets_tests.support.views import PATIENT, load, patient, select

DAY = datetime(2024, 1, 1, tzinfo=UTC)
Version = tuple[int | None, int, int | None]
"""The day of ``lastUpdated``, the day of arrival and the ``versionId`` of a version."""


def build(version: Version, key: str = "a") -> Record:
    updated, arrived, number = version
    moment = None if updated is None else DAY + timedelta(days=updated)
    record = patient(key, moment.isoformat() if moment else None, None if number is None else str(number))
    body = record.body[:-1] + f', "active": true, "gender": "{version}"}}'.encode()
    return Record("Patient", key, record.version_id, moment, DAY + timedelta(days=arrived), body)


def load_all(conn: Session, *versions: Version, together: bool = False) -> Version:
    """Load the versions of one resource, in one load or each by itself, and return the one in the tables."""
    records = [build(version) for version in versions]
    if together:
        load(conn, *records, views=(PATIENT,))
    else:
        for record in records:
            load(conn, record, views=(PATIENT,))
    return stored(conn)


def stored(conn: Session) -> Version:
    ((text, in_view),) = select(
        conn,
        "SELECT resource->>'gender', (SELECT string_agg(gender, ',') FROM fhir.patient) FROM fhir.resource"
        " WHERE resource IS NOT NULL",
    )
    assert in_view == text
    version: Version = eval(text)
    conn.execute("DELETE FROM fhir.resource")
    conn.execute("DELETE FROM fhir.patient")
    conn.commit()
    return version


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "newest"),
    [
        pytest.param((5, 6, 1), (None, 7, 2), (None, 7, 2), id="an undated version that arrives later is newer"),
        pytest.param((5, 6, 1), (None, 7, None), (None, 7, None), id="also without a versionId"),
        pytest.param((None, 7, 1), (5, 8, 1), (5, 8, 1), id="a dated version that arrives later is newer"),
        pytest.param((None, 7, 1), (5, 6, 1), (None, 7, 1), id="a dated version that arrived earlier is older"),
        pytest.param((None, 7, 1), (None, 8, 1), (None, 8, 1), id="of two undated versions the last arrival is newer"),
        pytest.param((None, 7, 2), (None, 7, 1), (None, 7, 2), id="a numeric versionId breaks the tie of arrivals"),
        pytest.param((5, 6, 9), (5, 6, 10), (5, 6, 10), id="a numeric versionId breaks the tie of lastUpdated"),
        pytest.param((5, 9, 1), (6, 7, 1), (6, 7, 1), id="lastUpdated decides whatever the order of arrival"),
        pytest.param((5, 7, 1), (None, 7, 1), (None, 7, 1), id="what arrives together has the order in which it came"),
    ],
)
def test_the_newer_of_two_versions_is_stored(
    conn: Session, first: Version, second: Version, newest: Version, together: bool
) -> None:
    assert load_all(conn, first, second, together=together) == newest


def test_a_version_that_comes_again_does_not_replace_the_undated_one_that_had_replaced_it(conn: Session) -> None:
    assert load_all(conn, (5, 6, 1), (None, 7, 2), (5, 9, 1)) == (None, 7, 2)
    assert load_all(conn, (5, 6, 1), (None, 7, 2), (None, 8, 3), (4, 9, 1)) == (None, 8, 3)
    assert load_all(conn, (5, 6, 1), (None, 7, 2), (6, 9, 3)) == (6, 9, 3)


def test_three_versions_end_with_the_same_one_whenever_they_are_loaded_in_the_order_of_arrival_or_twice(
    conn: Session,
) -> None:
    versions: list[Version] = [(5, 6, 1), (None, 7, 2), (6, 8, 3)]
    for order in permutations(versions):
        assert load_all(conn, *versions, *order) == (6, 8, 3)


VERSIONS = st.lists(
    st.tuples(st.none() | st.integers(1, 4), st.integers(5, 9), st.none() | st.integers(1, 3)), min_size=1, max_size=6
)


def model(versions: list[Version]) -> Version:
    """Return the newest version of a sequence of versions that are loaded one after the other."""
    newest, replaced = versions[0], None
    for version in versions[1:]:
        (updated, arrived, number), (known, known_arrival, known_number) = version, newest
        if (updated is None) == (known is None):
            moment, known_moment = (arrived, known_arrival) if updated is None or known is None else (updated, known)
            wins = (moment, number or 0) >= (known_moment, known_number or 0)
        elif updated is None:
            wins = arrived >= known_arrival
        else:
            wins = arrived >= known_arrival and (replaced is None or updated > replaced)
        if wins:
            replaced = (replaced if known is None else known) if updated is None else None
            newest = version
    return newest


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(versions=VERSIONS)
def test_versions_that_are_loaded_one_by_one_end_with_the_newest(conn: Session, versions: list[Version]) -> None:
    assert load_all(conn, *versions) == model(versions)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(versions=VERSIONS)
def test_one_load_keeps_the_newest_dated_and_the_newest_other_version_and_of_the_two_the_later(
    conn: Session, versions: list[Version]
) -> None:
    newest: dict[bool, tuple[tuple[int, int, int], int, Version]] = {}
    for number, version in enumerate(versions):
        updated, arrived, version_number = version
        key = (arrived if updated is None else updated, version_number or 0, number)
        dated = updated is not None
        if dated not in newest or key >= newest[dated][0]:
            newest[dated] = (key, number, version)
    in_order = [version for _, _, version in sorted(newest.values(), key=lambda item: item[1])]
    assert load_all(conn, *versions, together=True) == model(in_order)


@dataclass
class _Tables:
    conn: Session

    def delete(self, day: int, number: str | None = None) -> None:
        with self.conn.transaction():
            deletions.apply(self.conn, [Deletion("Patient", "a", DAY + timedelta(days=day), number)], run_id="run")

    def load(self, version: Version) -> None:
        load(self.conn, build(version), views=(PATIENT,))

    def is_there(self) -> bool:
        return bool(select(self.conn, "SELECT id FROM fhir.resource WHERE resource IS NOT NULL"))


@pytest.fixture
def tables(conn: Session) -> _Tables:
    return _Tables(conn)


@pytest.mark.parametrize(
    ("version", "remains"),
    [
        pytest.param((None, 8, 1), True, id="an undated version that arrived after the deletion"),
        pytest.param((None, 6, 1), False, id="an undated version that arrived before the deletion"),
        pytest.param((6, 9, 1), False, id="an older dated version that arrived after the deletion"),
        pytest.param((8, 9, 1), True, id="a newer dated version"),
        pytest.param((7, 9, 3), True, id="a version of the same time with a greater number"),
        pytest.param((7, 9, 1), False, id="a version of the same time with a smaller number"),
    ],
)
@pytest.mark.parametrize("deletion_first", [False, True])
def test_a_deletion_has_its_place_among_the_versions(
    tables: _Tables, version: Version, remains: bool, deletion_first: bool
) -> None:
    if deletion_first:
        tables.delete(7, "2")
        tables.load(version)
    else:
        tables.load(version)
        tables.delete(7, "2")
    assert tables.is_there() is remains
