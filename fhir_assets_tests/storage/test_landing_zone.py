"""What this project writes to the landing zone appears complete or not at all."""

import resource
from pathlib import Path

import pytest

from fhir_assets.errors import StoreError
from fhir_assets.storage.landing_zone import FolderZone


def test_a_file_that_does_not_fit_on_the_disk_leaves_the_earlier_one_and_no_part(tmp_path: Path) -> None:
    zone = FolderZone(tmp_path)
    zone.put("a.csv", b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StoreError, match="File too large"):
            zone.put("a.csv", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.csv": b"before", "a.csv.done": b""}
