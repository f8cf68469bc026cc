"""The store in a folder and in a bucket: parts, manifests, damage and unfinished files."""

import gzip
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fhir_assets.deployment.store import build_bucket
from fhir_assets.errors import ConfigurationError, StoreError
from fhir_assets.notices import Notice
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.settings import load_settings
from fhir_assets.storage.manifest import Fetch, Fetched, Manifest
from fhir_assets.storage.orphans import find_unreferenced_parts
from fhir_assets.storage.part_writer import PartWriter, flatten_batches
from fhir_assets.storage.store import Store, open_store

NOW = datetime(2024, 1, 2, tzinfo=UTC)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"), NO_ENCRYPTION)
    url = request.getfixturevalue("s3_url")
    return open_store(url, NO_ENCRYPTION, bucket=lambda url: build_bucket(load_settings(), url))


def list_files(store: Store) -> list[str]:
    """Return the files of the store and of its spool."""
    spooled = [path.name for path in store.blobs.spool().iterdir()]
    return sorted({*store.blobs.names(""), *spooled})


def lines(count: int, size: int = 40) -> list[bytes]:
    return [b'{"n":%d,"pad":"%s"}' % (n, b"x" * size) for n in range(count)]


def write(store: Store, key: str, content: list[bytes], **options: int) -> Manifest:
    with PartWriter(store, "raw", **options) as writer:
        for line in content:
            writer.add("Patient", key, line, NOW)
        parts = writer.finish().get(("Patient", key), ())
    manifest = Manifest("raw", "Patient", key, "run", NOW, parts)
    store.commit([manifest])
    return manifest


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), max_size=60))
def test_each_line_keeps_the_time_of_its_arrival(arrivals: list[tuple[int, bool, bool]]) -> None:
    with TemporaryDirectory() as folder:
        store = open_store(folder, NO_ENCRYPTION)
        with PartWriter(store, "raw", buffer_bytes=100) as writer:
            for number, (hours, known, dated) in enumerate(arrivals):
                arrived = NOW + timedelta(hours=hours) if known else None
                writer.add("Patient", "w", b'{"n":%d}' % number, NOW, arrived=arrived, dated=dated)
            parts = writer.finish().get(("Patient", "w"), ())
        found = {}
        for batch in store.batches_with_arrivals(parts):
            for line, arrived in zip(batch.lines, batch.times(), strict=False):
                found[line] = (arrived, batch.dated)
    assert found == {
        b'{"n":%d}' % number: (NOW + timedelta(hours=hours) if known else None, dated)
        for number, (hours, known, dated) in enumerate(arrivals)
    }
    for part in parts:
        assert not part.arrivals or sum(arrival.rows for arrival in part.arrivals) == part.rows


def test_arrivals_are_cut_at_the_ends_of_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fhir_assets.storage.store.BATCH_BYTES", 100)
    store = open_store(str(tmp_path), NO_ENCRYPTION)
    times = {line: NOW + timedelta(hours=number // 7) for number, line in enumerate(lines(50))}
    with PartWriter(store, "raw") as writer:
        for line, arrived in times.items():
            writer.add("Patient", "w", line, None, arrived=arrived)
        parts = writer.finish()["Patient", "w"]
    batches = list(store.batches_with_arrivals(parts))
    assert len(batches) > 10
    assert {line: at for batch in batches for line, at in zip(batch.lines, batch.times(), strict=True)} == times


def test_lines_are_read_back_byte_for_byte(store: Store) -> None:
    content = lines(5000)
    write(store, "2024-01-01", content, buffer_bytes=10_000)
    manifest = store.manifest("raw", "Patient", "2024-01-01")
    assert manifest is not None
    assert list(flatten_batches(store.batches(manifest.parts))) == content
    assert (manifest.rows, manifest.bytes) == (5000, sum(map(len, content)) + 5000)


def test_lines_of_many_partitions_may_be_interleaved(store: Store) -> None:
    with PartWriter(store, "raw", buffer_bytes=500) as writer:
        for n, line in enumerate(lines(300)):
            writer.add("Patient", f"k{n % 7}", line, None)
        parts = writer.finish()
    for k in range(7):
        read = list(flatten_batches(store.batches(parts["Patient", f"k{k}"])))
        assert read == [line for n, line in enumerate(lines(300)) if n % 7 == k]


def test_nothing_is_visible_before_the_commit(store: Store) -> None:
    before = write(store, "k", lines(3))
    with PartWriter(store, "raw") as writer:
        writer.add("Patient", "k", b"{}", None)
        writer.finish()
    assert store.manifest("raw", "Patient", "k") == before


def test_a_writer_that_is_not_finished_leaves_no_files(store: Store) -> None:
    with PartWriter(store, "raw", buffer_bytes=1) as writer:
        writer.add("Patient", "k", b"{}", None)
        assert list_files(store)
    assert list_files(store) == []


def test_names_are_listed_below_their_folder_and_deleted_by_name(store: Store) -> None:
    write(store, "k", lines(1))
    write(store, "kk", lines(1))
    (part,) = [name for name in store.blobs.names("raw/patient/k") if name.endswith(".gz")]
    store.blobs.delete(part)
    assert list(store.blobs.names("raw/patient/k")) == ["raw/patient/k/manifest.json"]
    store.blobs.delete(part)


def test_manifests_are_returned_in_the_order_of_their_keys(store: Store) -> None:
    for n in range(20):
        write(store, f"k{n:02}", lines(n))
    keys = [f"k{n:02}" for n in range(30)]
    assert [manifest.rows for manifest in store.manifests("raw", "Patient", keys)] == list(range(20))


def test_a_manifest_is_read_back_unchanged(store: Store) -> None:
    notices = (Notice("error", "incomplete", "some are missing", "Patient"), Notice("warning", "unsorted", "by id"))
    fetch = Fetch(None, NOW, NOW, 10, 9, 1, 2, notices)
    manifest = Manifest("raw", "Patient", "k", "run", NOW, (), fetched=Fetched(NOW, False, (fetch,), "state"))
    store.commit([manifest])
    assert store.manifest("raw", "Patient", "k") == manifest
    assert store.manifest("raw", "Patient", "other") is None


@pytest.mark.parametrize("damage", ["cut", "gone", "short", "noise"])
def test_a_damaged_part_is_an_error_and_never_a_shorter_partition(store: Store, damage: str) -> None:
    manifest = write(store, "k", lines(5000))
    name = manifest.parts[0].name
    content = store.blobs.get(name)
    assert content
    if damage == "gone":
        store.blobs.delete(name)
    elif damage == "cut":
        store.blobs.put(name, content[: len(content) // 2])
    elif damage == "noise":
        store.blobs.put(name, content[:100] + bytes(200) + content[300:])
    else:
        other = write(store, "other", lines(4999))
        store.blobs.put(name, store.blobs.get(other.parts[0].name) or b"")
    with pytest.raises(StoreError):
        list(store.batches(manifest.parts))


@pytest.mark.parametrize(
    ("layer", "advice"),
    [
        ("raw", "keep the parts in the same folder.* ops.received lists"),
        ("validated", "materialize the partition again"),
    ],
)
def test_the_error_for_a_damaged_manifest_explains_how_to_keep_the_parts(store: Store, layer: str, advice: str) -> None:
    store.blobs.put(f"{layer}/patient/k/manifest.json", b"{")
    with pytest.raises(StoreError, match=rf"{layer}/patient/k/manifest\.json is damaged: .*{advice}"):
        store.manifest(layer, "Patient", "k")


def test_a_store_that_cannot_be_written_raises_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        write(open_store(str(tmp_path / "file" / "store"), NO_ENCRYPTION), "k", lines(1))


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="FHIR_STORE_URL"):
        open_store("ftp://somewhere", NO_ENCRYPTION)


def test_unfinished_files_of_a_killed_run_are_ignored_and_listed_as_unreferenced(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), NO_ENCRYPTION)
    manifest = write(store, "2024-01-01", lines(1))
    unfinished = "raw/patient/2024-01-01/.manifest.json.0a1b.tmp"
    (tmp_path / unfinished).write_bytes(b"{")
    assert store.manifest("raw", "Patient", "2024-01-01") == manifest
    assert store.partition_keys("raw", "Patient") == ["2024-01-01"]
    later = datetime.now(UTC) + timedelta(hours=1)
    assert [part.name for part in find_unreferenced_parts(store, "raw", before=later)] == [unfinished]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path), NO_ENCRYPTION)

    def fail_with_full_disk(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail_with_full_disk)
    with pytest.raises(StoreError, match="No space left"):
        store.blobs.put("raw/patient/2024-01-01/manifest.json", b"{}")
    assert list_files(store) == []


def test_a_part_that_is_larger_than_its_manifest_says_is_damaged(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), NO_ENCRYPTION)
    (part,) = write(store, "k", lines(1)).parts
    (tmp_path / part.name).write_bytes(gzip.compress(bytes(1 << 24)))
    with pytest.raises(StoreError, match="damaged"):
        list(store.batches([part]))


def test_a_stray_file_in_the_store_is_no_part(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), NO_ENCRYPTION)
    write(store, "k", lines(1))
    for folder in ("raw", "raw/patient", "raw/patient/k/deeper"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "stray.ndjson.gz").touch()
    assert list(find_unreferenced_parts(store, "raw", before=datetime.now(UTC) + timedelta(days=1))) == []
