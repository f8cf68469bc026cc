"""Links, pipes and odd names in the store's own folder: none is followed or waited for, and the files go on."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fhir_assets.errors import StoreError
from fhir_assets.storage.blobs import LocalBlobs
from fhir_assets.storage.orphans import find_unfinished_files, remove_unfinished_files
from fhir_assets_tests.support.odd_files import put_odd_files


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobs:
    (tmp_path / "store" / "raw").mkdir(parents=True)
    return LocalBlobs(tmp_path / "store")


def test_odd_files_are_left_out_of_a_listing(blobs: LocalBlobs) -> None:
    odd = put_odd_files(blobs.root / "raw")
    (blobs.root / "raw" / "out").symlink_to("/etc")
    names = list(blobs.names("raw"))
    assert "raw/good.ndjson" in names
    assert len(names) == 2 + odd.readable + odd.not_utf_8  # a file that is called pipe, too
    assert {file.name for file in blobs.listing("raw")} == set(names)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "loop"])
def test_what_is_no_file_is_refused_and_named(kind: str, blobs: LocalBlobs, tmp_path: Path) -> None:
    path, outside = blobs.root / "manifest.json", tmp_path / "outside"
    outside.write_text("secret")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(outside if kind == "link" else path)
    with pytest.raises(StoreError, match=r"manifest.json: it is a (link|pipe|folder)"):
        blobs.get("manifest.json")
    with pytest.raises(StoreError, match=r"manifest.json: it is a (link|pipe|folder)"):
        blobs.open("manifest.json")
    if kind == "link":
        blobs.put("manifest.json", b"new")
        assert outside.read_text() == "secret"
        assert blobs.get("manifest.json") == b"new"


def test_a_spool_that_is_a_link_empties_no_other_folder(blobs: LocalBlobs, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "old").touch()
    os.utime(other / "old", (0, 0))
    (blobs.root / ".spool").symlink_to(other)
    assert list(find_unfinished_files(blobs, before=datetime.now(UTC) - timedelta(days=1))) == []
    remove_unfinished_files(blobs)
    assert (other / "old").exists()
    with pytest.raises(StoreError, match="a link to a folder"):
        blobs.create_spooled(".export")
