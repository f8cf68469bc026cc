"""Re-encryption of parts: name and lines stay the same, and deleted or unreferenced parts cause no failure."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fhir_assets.privacy.encryption import Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.storage.manifest import Manifest
from fhir_assets.storage.orphans import find_unreferenced_parts
from fhir_assets.storage.part_writer import PartWriter
from fhir_assets.storage.reencrypt import list_part_keys, reencrypt
from fhir_assets.storage.store import Store, open_store

OLD, NEW = new_key(), new_key()
OLD_CIPHER, BOTH, NEW_CIPHER = (Cipher(parse_keys(keys)) for keys in ([OLD], [NEW, OLD], [NEW]))
NOW = datetime(2024, 1, 2, tzinfo=UTC)
LINES = [b'{"n":%d}' % n for n in range(100_000)]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    with PartWriter(open_store(str(tmp_path), OLD_CIPHER), "raw", buffer_bytes=1 << 18) as writer:
        for line in LINES:
            writer.add("Patient", "2024-01-01", line, NOW)
        [(_, parts)] = writer.finish().items()
    manifest = Manifest("raw", "Patient", "2024-01-01", "run", NOW, parts)
    open_store(str(tmp_path), OLD_CIPHER).commit([manifest])
    return manifest


def open_with(folder: Path, cipher: Cipher) -> Store:
    return open_store(str(folder), cipher)


def read_lines(store: Store, manifest: Manifest) -> Iterator[bytes]:
    return (line for batch in store.batches(manifest.parts) for line in batch)


def test_a_reencrypted_part_keeps_its_name_and_lines_and_an_open_reader_continues(
    tmp_path: Path, manifest: Manifest
) -> None:
    reader = read_lines(open_with(tmp_path, BOTH), manifest)
    first = [next(reader)]
    [(name, key)] = list_part_keys(open_with(tmp_path, BOTH))
    assert (name, key) == (manifest.parts[0].name, OLD_CIPHER.key_id)
    assert list(reencrypt(open_with(tmp_path, BOTH), [(name, key)], BOTH)) == [(name, key, None)]
    assert list(list_part_keys(open_with(tmp_path, NEW_CIPHER))) == [(name, NEW_CIPHER.key_id)]
    assert first + list(reader) == LINES
    assert list(read_lines(open_with(tmp_path, NEW_CIPHER), manifest)) == LINES


def test_a_part_that_was_deleted_in_the_meantime_counts_as_done(tmp_path: Path, manifest: Manifest) -> None:
    name = manifest.parts[0].name
    (tmp_path / name).unlink()
    assert list(reencrypt(open_with(tmp_path, BOTH), [(name, OLD_CIPHER.key_id)], BOTH)) == [
        (name, OLD_CIPHER.key_id, None)
    ]
    assert not (tmp_path / name).exists()


def test_encrypted_parts_that_no_manifest_names_are_found(tmp_path: Path, manifest: Manifest) -> None:
    old_store = open_with(tmp_path, OLD_CIPHER)
    later = datetime.now(UTC) + timedelta(days=1)
    assert list(find_unreferenced_parts(old_store, "raw", before=later)) == []
    old_store.commit([Manifest("raw", "Patient", "2024-01-01", "run", NOW, ())])
    assert [part.name for part in find_unreferenced_parts(old_store, "raw", before=later)] == [manifest.parts[0].name]
