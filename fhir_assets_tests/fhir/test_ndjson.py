"""The source `ndjson`: every line is a record, a rejected input, or blank."""

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fhir_assets.catalog import BY_NAME
from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir import lines
from fhir_assets.fhir.files.ndjson import NdjsonSource
from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.windows import Interval

ALWAYS = Interval(None, datetime(9000, 1, 1, tzinfo=UTC))
DAY = Interval(datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 1, 2, tzinfo=UTC))
WRITTEN = datetime(2024, 5, 1, 12, tzinfo=UTC)
SECRET = "Mustermann"
SYNTHEA = Path(__file__).resolve().parents[2].parent / "shared/data/synthea"


def line(resource_type: str = "Patient", resource_id: str = "a", updated: str | None = "2024-01-01T08:00:00Z") -> bytes:
    meta = {"meta": {"lastUpdated": updated}} if updated else {}
    return json.dumps({"resourceType": resource_type, "id": resource_id, **meta}).encode()


def write(path: Path, content: bytes | Iterable[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else b"".join(row + b"\n" for row in content))
    os.utime(path, (WRITTEN.timestamp(), WRITTEN.timestamp()))
    return path


def read(
    location: Path | str, *types: str, interval: Interval = ALWAYS, max_line_bytes: int = 2**20
) -> list[Record | RejectedInput]:
    return list(NdjsonSource(str(location), max_line_bytes=max_line_bytes).fetch(types or ("Patient",), interval))


def records(items: Iterable[Record | RejectedInput]) -> list[Record]:
    return [item for item in items if isinstance(item, Record)]


def rejects(items: Iterable[Record | RejectedInput]) -> list[RejectedInput]:
    return [item for item in items if isinstance(item, RejectedInput)]


def paths_of_rejects(items: Iterable[Record | RejectedInput]) -> list[str]:
    return [item.path for item in rejects(items)]


def ids(items: Iterable[Record | RejectedInput]) -> list[str]:
    return [item.id for item in records(items)]


def test_the_bytes_of_a_line_are_kept(tmp_path: Path) -> None:
    body = b'{ "resourceType":"Patient" ,"id":"a", "x":1.10, "meta":{"versionId":"3"} }'
    (record,) = records(read(write(tmp_path / "Patient.ndjson", [b"  " + body + b" \r"])))
    assert record == Record("Patient", "a", "3", None, WRITTEN, body)


def test_blank_lines_and_a_missing_last_line_feed_are_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "Patient.ndjson", b"\n\r\n" + line() + b"\n  \n\n" + line(resource_id="b"))
    items = read(path)
    assert ids(items) == ["a", "b"]
    assert not rejects(items)


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "Patient.ndjson", b"\xef\xbb\xbf" + line() + b"\r\n" + line(resource_id="b") + b"\r\n")
    assert [record.body for record in records(read(path))] == [line(), line(resource_id="b")]


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        (b'{"resourceType":"Patient","id":"a"', "json"),
        (b'{"resourceType":"Patient","id":"a"} ' + SECRET.encode(), "json"),
        (SECRET.encode(), "json"),
        (b"\x00\xff\xfe", "json"),
        (b'{"x":' + b"[" * 5000, "json"),
        (b"[]", "structure"),
        (b"null", "structure"),
        (f'"{SECRET}"'.encode(), "structure"),
        (b'{"id":"a"}', "structure"),
        (b'{"resourceType":"Patient","id":7}', "structure"),
        (b'{"resourceType":"Patient","id":"a","meta":[]}', "structure"),
        (line("Observation", SECRET), "structure"),
        (line(SECRET), "structure"),
    ],
)
def test_a_malformed_line_is_rejected_with_file_and_line(tmp_path: Path, bad: bytes, rule: str) -> None:
    items = read(write(tmp_path / "Patient.ndjson", [line(), b"", bad, line(resource_id="b")]))
    assert ids(items) == ["a", "b"]
    (item,) = rejects(items)
    assert (item.resource_type, item.rule, item.path) == ("Patient", rule, "Patient.ndjson:3")
    assert (item.body, item.arrived) == (bad, WRITTEN)
    assert SECRET not in item.message


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("Patient.ndjson", {"Patient"}),
        ("Patient.000.ndjson.gz", {"Patient"}),
        ("1.Patient.ndjson", {"Patient"}),
        ("MimicPatient.ndjson", {"Patient"}),
        ("Patient_part1.ndjson", {"Patient"}),
        ("Patient-2024.jsonl", {"Patient"}),
        ("Patient.gz", {"Patient"}),
        ("MimicMedicationAdministrationICU.ndjson.gz", {"MedicationAdministration"}),
        ("MimicObservationLabevents.ndjson", {"Observation"}),
        ("MedicationRequest.ndjson", {"MedicationRequest"}),
        ("export.ndjson", None),
        ("patient.ndjson", None),
        ("Inpatient.ndjson", None),
        ("InPatients.ndjson", None),
    ],
)
def test_the_type_of_a_file_is_read_from_its_name(tmp_path: Path, name: str, types: set[str] | None) -> None:
    write(tmp_path / name, b"")
    assert NdjsonSource(str(tmp_path)).list_types() == (None if types is None else frozenset(types))


def test_resources_of_a_type_outside_of_the_catalog_are_skipped_and_counted(tmp_path: Path) -> None:
    write(tmp_path / "MedicationKnowledge.ndjson", [line("MedicationKnowledge")] * 3)
    source = NdjsonSource(str(tmp_path))
    assert list(source.fetch(["Medication"], ALWAYS)) == []
    assert source.skipped == {"MedicationKnowledge": 3}


def test_in_a_mixed_file_the_type_is_read_from_each_line(tmp_path: Path) -> None:
    broken = [b'{"resourceType": "Encounter", ', b'{"resourceType":"Patient","x"', b"{"]
    write(tmp_path / "all.ndjson", [line(), line("Encounter"), line("Slot"), line("Observation"), *broken])
    source = NdjsonSource(str(tmp_path))
    items = list(source.fetch(["Patient", "Observation"], ALWAYS))
    assert [item.resource_type for item in items] == ["Patient", "Observation", "Patient", "Patient"]
    assert paths_of_rejects(items) == ["all.ndjson:6", "all.ndjson:7"]
    assert source.skipped == {"Slot": 1}


def test_files_of_other_types_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "Patient.ndjson", [line()])
    write(tmp_path / "Observation.ndjson", [b"broken"])
    assert ids(read(tmp_path)) == ["a"]
    assert paths_of_rejects(read(tmp_path)) == []


def test_a_folder_is_read_with_its_subfolders_and_other_files_are_ignored(tmp_path: Path) -> None:
    write(tmp_path / "b/deep/Patient.ndjson", [line(resource_id="deep"), b"?"])
    write(tmp_path / "Patient.jsonl.gz", gzip.compress(line(resource_id="zipped")))
    write(tmp_path / "manifest.json", [b'{"transactionTime": "2024-01-01T00:00:00Z", "output": []}'])
    for name in ("notes.txt", ".Patient.ndjson", "dump.tar.gz", "table.csv.gz"):
        write(tmp_path / name, [b"nothing"])
    items = read(tmp_path)
    assert ids(items) == ["zipped", "deep"]
    assert paths_of_rejects(items) == ["b/deep/Patient.ndjson:2"]


def test_a_glob_selects_the_files_that_match(tmp_path: Path) -> None:
    for name in ("2023/Patient.ndjson", "2024/Patient.ndjson", "2024/Patient.txt"):
        write(tmp_path / name, [line(resource_id=name[:4]), b"?"])
    items = read(f"{tmp_path}/*/*.ndjson")
    assert ids(items) == ["2023", "2024"]
    assert paths_of_rejects(items) == ["2023/Patient.ndjson:2", "2024/Patient.ndjson:2"]


def test_a_json_file_is_one_resource_over_many_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "example.json", json.dumps(json.loads(line()), indent=2).encode())
    (record,) = records(read(path))
    assert json.loads(record.body) == json.loads(line())
    assert b"\n" not in record.body


def bundle(*resources: object, **more: object) -> bytes:
    entries = [{"resource": resource} for resource in resources]
    return json.dumps({"resourceType": "Bundle", "type": "collection", "entry": entries, **more}).encode()


def test_containers_in_lines_and_documents_give_their_resources(tmp_path: Path) -> None:
    a, b, c = (json.loads(line(resource_id=name)) for name in "abc")
    encounter = json.loads(line("Encounter"))
    write(tmp_path / "1.ndjson", [bundle(a, encounter), line(resource_id="plain")])
    write(tmp_path / "2.json", bundle(b, encounter))
    write(tmp_path / "3.json.gz", gzip.compress(json.dumps([json.loads(bundle(c)), {"resourceType": "Slot"}]).encode()))
    source = NdjsonSource(str(tmp_path))
    items = list(source.fetch(["Patient"], ALWAYS))
    assert ids(items) == ["a", "plain", "b", "c"]
    assert not rejects(items)
    assert source.skipped == {"Slot": 1}
    assert source.list_types() is None


def test_what_a_container_lacks_or_cannot_say_is_rejected(tmp_path: Path) -> None:
    deletion = {"request": {"method": "DELETE", "url": "Patient/a"}}
    following = [{"relation": "next", "url": "https://h.example/next"}]
    write(tmp_path / "1.json", bundle(json.loads(line()), link=following))
    write(tmp_path / "2.ndjson", [json.dumps({"resourceType": "Bundle", "entry": [deletion]}).encode()])
    write(tmp_path / "3.json", [b"nothing"])
    write(tmp_path / "Encounter.ndjson", [bundle(json.loads(line("Encounter")), json.loads(line("Observation")))])
    items = read(tmp_path, "Patient", "Encounter")
    assert ids(items) == ["a", "a"]
    assert paths_of_rejects(items) == ["1.json:document.link", "2.ndjson", "3.json:document", "Encounter.ndjson"]


@pytest.mark.parametrize("name", ["gone.ndjson", "gone/*.ndjson", "empty"])
def test_a_location_without_files_is_a_configuration_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    source = NdjsonSource(str(tmp_path / name))
    with pytest.raises(ConfigurationError, match="the base URL"):
        source.compute_state()
    with pytest.raises(ConfigurationError, match="the base URL"):
        list(source.fetch(["Patient"], ALWAYS))


def test_gzip_is_recognized_by_its_bytes_and_may_have_many_members(tmp_path: Path) -> None:
    write(
        tmp_path / "Patient.1.ndjson",
        gzip.compress(line() + b"\n" + line(resource_id="b")[:9]) + gzip.compress(line(resource_id="b")[9:] + b"\n"),
    )
    write(tmp_path / "Patient.2.ndjson.gz", [line(resource_id="plain")])
    assert ids(read(tmp_path)) == ["a", "b", "plain"]


def test_a_truncated_compressed_file_is_rejected_after_its_complete_lines(tmp_path: Path) -> None:
    bodies = [line(resource_id=f"{n}-{zlib.crc32(b'%d' % n)}") for n in range(20_000)]
    compressed = gzip.compress(b"\n".join(bodies))
    cut = compressed[: len(compressed) // 2]
    complete = zlib.decompressobj(31).decompress(cut).count(b"\n")
    items = read(write(tmp_path / "Patient.ndjson.gz", cut))
    assert [record.body for record in records(items)] == bodies[:complete]
    (item,) = rejects(items)
    assert (item.path, item.rule) == (f"Patient.ndjson.gz:{complete + 1}", "json")
    assert f"cut off; {complete} lines were read" in item.message


def test_a_damaged_compressed_file_is_rejected_and_the_others_are_read(tmp_path: Path) -> None:
    compressed = bytearray(gzip.compress(b"\n".join(line(resource_id=str(n)) for n in range(1000)), mtime=0))
    compressed[40:60] = b"\xff" * 20
    write(tmp_path / "1.Patient.ndjson.gz", bytes(compressed))
    write(tmp_path / "2.Patient.ndjson.gz", gzip.compress(line()))
    items = read(tmp_path)
    assert ids(items)[-1] == "a"
    assert [place.partition(":")[0] for place in paths_of_rejects(items)][-1] == "1.Patient.ndjson.gz"
    assert "damaged" in rejects(items)[-1].message


def test_a_line_longer_than_the_limit_is_rejected_without_its_content(tmp_path: Path) -> None:
    long = line(resource_id="x" * 5_000_000)
    path = write(tmp_path / "Patient.ndjson", [line(), long, line(resource_id="b"), long, long])
    items = read(path, max_line_bytes=1000)
    assert ids(items) == ["a", "b"]
    assert paths_of_rejects(items) == ["Patient.ndjson:2", "Patient.ndjson:4", "Patient.ndjson:5"]
    assert {item.body for item in rejects(items)} == {b""}
    assert len(records(read(path, max_line_bytes=6_000_000))) == 5


def test_an_interval_contains_the_resources_updated_in_it(tmp_path: Path) -> None:
    times = ["2023-12-31T23:59:59.999Z", "2024-01-01T00:00:00Z", "2024-01-02T00:30:00+01:00", "2024-01-02T00:00:00Z"]
    write(tmp_path / "Patient.ndjson", [line(updated=time, resource_id=f"{n}") for n, time in enumerate(times)])
    assert ids(read(tmp_path, interval=DAY)) == ["1", "2"]


@pytest.mark.parametrize("updated", ["0001-01-01T00:00:00+14:00", "0001-01-01T00:00:00Z", "1000-06-01T00:00:00Z"])
def test_a_resource_of_any_year_is_older_than_the_first_window_and_read_with_it(tmp_path: Path, updated: str) -> None:
    write(tmp_path / "Patient.ndjson", [line(updated=updated)])
    assert ids(read(tmp_path, interval=Interval(None, DAY.end))) == ["a"]
    extent = NdjsonSource(str(tmp_path)).find_extent(["Patient"])
    assert extent
    assert extent.start
    assert extent.start in Interval(None, DAY.end)


def test_a_last_updated_that_a_clock_ahead_can_have_set_counts_and_a_later_one_does_not(tmp_path: Path) -> None:
    now = WRITTEN + timedelta(days=1)
    ahead, future = now + timedelta(minutes=4), now + timedelta(minutes=6)
    path = write(tmp_path / "Patient.ndjson", [line(updated=ahead.isoformat()), line(updated=future.isoformat())])
    items = list(NdjsonSource(str(path), now=lambda: now).fetch(["Patient"], ALWAYS))
    assert [(record.as_of, record.dated) for record in records(items)] == [(ahead, True), (WRITTEN, False)]


def test_the_extent_of_files_with_dates_in_the_future_ends_now(tmp_path: Path) -> None:
    write(tmp_path / "Patient.ndjson", [line(), line(updated="9999-12-31T23:59:59.999999Z")])
    extent = NdjsonSource(str(tmp_path)).find_extent(["Patient"])
    assert extent
    assert (extent.start, extent.end) == (datetime(2024, 1, 1, 8, tzinfo=UTC), WRITTEN + timedelta(milliseconds=1))


@pytest.mark.parametrize("updated", [None, "yesterday", "2024-01-01", "9999-12-31T23:59:59-12:00"])
def test_a_resource_without_a_time_arrived_when_its_file_was_written(tmp_path: Path, updated: str | None) -> None:
    write(tmp_path / "Patient.ndjson", [line(updated=updated)])
    assert ids(read(tmp_path, interval=DAY)) == []
    (record,) = records(read(tmp_path, interval=Interval(WRITTEN, WRITTEN + timedelta(seconds=1))))
    assert (record.last_updated, record.as_of) == (None, WRITTEN)


def test_a_malformed_line_has_the_time_of_its_file(tmp_path: Path) -> None:
    write(tmp_path / "Patient.ndjson", [line(), b"?"])
    assert paths_of_rejects(read(tmp_path, interval=DAY)) == []
    assert paths_of_rejects(read(tmp_path, interval=Interval(WRITTEN, ALWAYS.end))) == ["Patient.ndjson:2"]
    extent = NdjsonSource(str(tmp_path)).find_extent(["Patient"])
    assert extent is not None
    assert WRITTEN in extent


def test_consecutive_intervals_return_every_line_once(tmp_path: Path) -> None:
    dated = [line(resource_id=f"{n}", updated=f"2024-01-0{1 + n % 4}T00:00:00Z") for n in range(12)]
    write(tmp_path / "Patient.ndjson", [*dated, b"?", line(resource_id="undated", updated=None)])
    days = [datetime(2024, 1, 2, tzinfo=UTC), datetime(2024, 1, 4, tzinfo=UTC), datetime(2025, 1, 1, tzinfo=UTC)]
    intervals = [Interval(None, days[0]), *(Interval(start, end) for start, end in pairwise(days))]
    parts = [item for interval in intervals for item in read(tmp_path, interval=interval)]
    everything = read(tmp_path)
    assert len(parts) == len(everything) == 14
    assert {item.body for item in parts} == {item.body for item in everything}


def test_a_resource_without_an_id_is_a_record_for_validation(tmp_path: Path) -> None:
    (record,) = records(read(write(tmp_path / "Patient.ndjson", [b'{"resourceType":"Patient"}'])))
    assert record.id == ""


def test_a_resource_of_another_type_than_the_file_name_is_rejected(tmp_path: Path) -> None:
    write(tmp_path / "MedicationRequest.ndjson", [line("MedicationRequest"), line("Medication")])
    assert paths_of_rejects(read(tmp_path, "MedicationRequest", "Medication")) == ["MedicationRequest.ndjson:2"]


def test_extent_goes_from_the_oldest_to_just_after_the_newest(tmp_path: Path) -> None:
    write(tmp_path / "Patient.ndjson", [line(updated="2024-01-03T00:00:00Z"), line(updated="2024-01-01T00:00:00Z")])
    write(tmp_path / "Observation.ndjson", [line("Observation", updated="2020-01-01T00:00:00Z")])
    source = NdjsonSource(str(tmp_path))
    extent = source.find_extent(["Patient"])
    assert extent is not None
    assert extent.start == datetime(2024, 1, 1, tzinfo=UTC)
    assert datetime(2024, 1, 3, tzinfo=UTC) in extent
    assert extent.end - datetime(2024, 1, 3, tzinfo=UTC) <= timedelta(seconds=1)
    assert source.find_extent(["Goal"]) is None


def test_state_changes_with_the_files(tmp_path: Path) -> None:
    path = write(tmp_path / "Patient.ndjson", [line()])
    source = NdjsonSource(str(tmp_path))
    before = source.compute_state()
    assert source.compute_state() == before
    write(tmp_path / "Patient.2.ndjson", [line(resource_id="b")])
    with_another = source.compute_state()
    os.utime(path, (0, 0))
    assert len({before, with_another, source.compute_state()}) == 3


@given(st.lists(st.binary(max_size=12)), st.integers(1, 9), st.integers(0, 12))
def test_lines_do_not_depend_on_chunk_boundaries(parts: list[bytes], size: int, limit: int) -> None:
    content = b"\n".join(part.replace(b"\xef", b"") for part in parts)
    chunks = [content[at : at + size] for at in range(0, len(content), size)]
    split = [item for batch in lines.split_lines(iter(chunks), limit) for item in batch]
    expected = content.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert split == [item if len(item) <= limit else None for item in expected]


@pytest.mark.skipif(not SYNTHEA.exists(), reason="the shared data is not here")
def test_every_line_of_synthea_is_a_record_of_the_type_of_its_file() -> None:
    source = NdjsonSource(str(SYNTHEA))
    received = Counter(item.resource_type for item in source.fetch(list(BY_NAME), ALWAYS) if isinstance(item, Record))
    files = SYNTHEA.glob("*.ndjson.gz")
    counted = {path.name.partition(".")[0]: gzip.decompress(path.read_bytes()).count(b"\n") for path in files}
    assert received == counted
    assert received.total() == 8421
    assert source.list_types() == frozenset(counted)
