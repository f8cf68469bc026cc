"""Records: which ``meta.lastUpdated`` counts, and which times can be read."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fhir_assets.fhir.record import CLOCK_SKEW, Record, build_record, parse_instant, read_header
from fhir_assets.windows import EARLIEST, LATEST

NOW = datetime(2024, 5, 1, 12, tzinfo=UTC)


def build(updated: str | None, *, version: str | None = None, posted: bool = False, gender: str = "male") -> Record:
    meta = {"lastUpdated": updated, "versionId": version}
    body = json.dumps({"resourceType": "Patient", "id": "a", "meta": meta, "gender": gender}).encode()
    return build_record(body, read_header(body), NOW, posted=posted)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2024-05-01T12:00:00Z", NOW),
        ("2024-05-01T14:00:00.000000999+02:00", NOW),
        ("2016-12-31T23:59:60Z", datetime(2017, 1, 1, tzinfo=UTC)),
        ("2017-01-01T00:59:60.5+01:00", datetime(2017, 1, 1, 0, 0, 0, 500_000, tzinfo=UTC)),
        ("9999-12-31T23:59:60Z", LATEST),
        ("9999-12-31T23:59:59-12:00", LATEST),
        ("0001-01-01T00:00:00+14:00", EARLIEST),
        ("2024-05-01T12:00:00", None),
        ("2024-05-01T23:59:60", None),
        ("2024-05-01", None),
        ("0000-01-01T00:00:00Z", None),
        ("2024-05-01T24:00:00Z", None),
        ("", None),
        (None, None),
    ],
)
def test_an_instant_of_the_years_1_to_9999_in_any_zone_has_a_time(text: str | None, moment: datetime | None) -> None:
    assert parse_instant(text) == moment


@given(
    st.datetimes(timezones=st.timezones()).map(datetime.isoformat)
    | st.from_regex(r"\d{4}-\d\d-\d\dT\d\d:\d\d:(\d\d|60)(\.\d+)?(Z|[+-]\d\d:\d\d)", fullmatch=True)
)
def test_reading_an_instant_raises_no_error(text: str) -> None:
    moment = parse_instant(text)
    assert moment is None or EARLIEST <= moment <= LATEST


def test_a_last_updated_within_clock_skew_counts_and_a_later_one_does_not() -> None:
    ahead = build((NOW + CLOCK_SKEW).isoformat())
    assert (ahead.last_updated, ahead.as_of, ahead.dated) == (NOW + CLOCK_SKEW, NOW + CLOCK_SKEW, True)
    later = build((NOW + CLOCK_SKEW + timedelta(seconds=1)).isoformat())
    assert (later.last_updated, later.as_of, later.dated) == (None, NOW, False)
    assert build("9999-12-31T23:59:59Z").as_of == NOW


def test_a_posted_last_updated_does_not_count() -> None:
    record = build("2024-01-01T00:00:00Z", posted=True)
    assert (record.last_updated, record.as_of, record.dated) == (None, NOW, False)


def test_versions_without_a_version_id_or_a_time_are_told_apart_by_their_content() -> None:
    for updated, version in ((None, None), (None, "1"), ("2024-01-01T00:00:00Z", None)):
        first, second = (build(updated, version=version, gender=gender) for gender in ("male", "female"))
        assert first.version_key != second.version_key
        assert first.version_key == build(updated, version=version).version_key
