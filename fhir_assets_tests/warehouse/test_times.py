"""Times of the years 1 to 9999 in any zone are stored, read and exported, also those that no UTC datetime holds."""

import csv
import json
from datetime import UTC, datetime, time, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.storage.store import open_store
from fhir_assets.warehouse.exports.export import Export
from fhir_assets.warehouse.postgres.db.connections import Session
from fhir_assets.warehouse.postgres.db.time_loaders import parse_outside_of_utc, to_microseconds
from fhir_assets.warehouse.postgres.tables import row_streams
from fhir_assets.warehouse.postgres.tables.layout import build_layout
from fhir_assets_tests.support.views import column, load, patient, select, view

LAST = "9999-12-31T23:59:59-05:00"
FIRST = "0001-01-01T00:00:00+01:00"
MICROSECOND = timedelta(microseconds=1)
TIMES = view(
    "times",
    "Patient",
    column("died", "deceased.ofType(dateTime)", "dateTime"),
    column("clock", "extension.value.ofType(time)", "time"),
)


def timed(key: str, died: str, clock: str = "10:00:00") -> Any:
    return patient(key, deceasedDateTime=died, extension=[{"url": "https://a.example/clock", "valueTime": clock}])


def read(conn: Session) -> dict[str, tuple[Any, Any]]:
    rows = row_streams.stream_rows(conn, build_layout(TIMES), columns=["_resource_key", "died", "clock"])
    return {key: (died, clock) for key, died, clock in rows}


def test_times_beyond_utc_are_read_in_a_zone_in_which_they_exist(conn: Session) -> None:
    load(conn, timed("a", LAST), timed("b", FIRST, "23:59:60"), timed("c", "2016-12-31T23:59:60Z"), views=(TIMES,))
    found = read(conn)
    assert found["a"] == (datetime(9999, 12, 31, 14, 59, 59, tzinfo=timezone(timedelta(hours=-14))), time(10))
    assert found["b"] == (datetime(1, 1, 1, 13, tzinfo=timezone(timedelta(hours=14))), "24:00:00")
    assert found["c"][0] == datetime(2017, 1, 1, tzinfo=UTC)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    moment=st.sampled_from([datetime(1, 1, 1), datetime(9999, 12, 31)]).flatmap(
        lambda day: st.timedeltas(timedelta(), timedelta(days=1) - MICROSECOND).map(lambda of_day: day + of_day)
    )
    | st.datetimes(),
    minutes=st.integers(-14 * 60, 14 * 60),
)
def test_every_time_in_every_zone_is_the_same_time_after_it_was_stored(
    conn: Session, moment: datetime, minutes: int
) -> None:
    expected = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    ((stored,),) = conn.execute("SELECT %s::timestamptz", [expected.isoformat()]).fetchall()
    assert to_microseconds(stored) == to_microseconds(expected)
    assert stored == expected
    assert len(stored.isoformat().split("-")[0]) == 4


@pytest.mark.parametrize("text", ["10000-01-02 00:00:00+00", "0001-12-30 23:00:00+00 BC", "0001-12-31 23:00:00+00", ""])
def test_other_texts_are_no_times_beyond_utc(text: str) -> None:
    assert parse_outside_of_utc(text) is None


@pytest.mark.parametrize("file_format", ["ndjson", "csv", "parquet"])
def test_exports_contain_every_time(conn: Session, tmp_path: Path, file_format: Any) -> None:
    load(
        conn,
        timed("a", LAST),
        timed("b", FIRST, "23:59:60"),
        timed("c", "9999"),
        timed("d", "2024-02"),
        patient("e"),
        views=(TIMES,),
    )
    store = open_store(str(tmp_path / "store"), NO_ENCRYPTION)
    with Export(conn, store, store.blobs, "out", actor="test", withholding=False) as export:
        file = export.for_type("Patient", None).write_table(TIMES, file_format)
        export.finish()
    path = tmp_path / "store/out" / file.name
    if file_format == "parquet":
        table = parquet.read_table(path).sort_by("_resource_key")
        assert table["died"].cast("int64").to_pylist() == [
            253402318799_000_000,
            -62135600400_000_000,
            253370764800_000_000,
            1706745600_000_000,
            None,
        ]
        assert table["clock"].cast("int64").to_pylist()[:2] == [36_000_000_000, 86_400_000_000]
        return
    with path.open() as text:
        rows = list(csv.DictReader(text)) if file_format == "csv" else [json.loads(line) for line in text]
    by_key = {row["_resource_key"]: row for row in rows}
    assert {key: by_key[key]["died"] for key in "abcd"} == {
        "a": "9999-12-31T14:59:59.000000-14:00",
        "b": "0001-01-01T13:00:00.000000+14:00",
        "c": "9999-01-01T00:00:00.000000+00:00",
        "d": "2024-02-01T00:00:00.000000+00:00",
    }
    assert (by_key["a"]["clock"], by_key["b"]["clock"]) == ("10:00:00.000000", "24:00:00.000000")
    assert not by_key["e"]["died"]


def test_what_a_warn_rule_lets_pass_is_stored_as_the_start_of_the_next_day(conn: Session) -> None:
    _, unloadable = load(
        conn, timed("a", "2024-01-01T24:00:00Z", "24:00:00"), timed("b", "2024-01-01T24:00:01Z"), views=(TIMES,)
    )
    assert [item.resource_id for item in unloadable] == ["b"]
    assert select(conn, "SELECT died::text, clock::text FROM fhir.times") == [("2024-01-02 00:00:00+00", "24:00:00")]
