"""What this project writes to the landing zone appears complete or not at all."""

import resource
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import cast

import pytest

from fhir_assets.errors import StoreError
from fhir_assets.pipeline.landing.step import LandingStep
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.storage.landing_zone import BucketZone, FolderZone, LandingFile
from fhir_assets.storage.s3 import Bucket
from fhir_assets.warehouse.postgres.db.connections import OpenSession


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


class _Bucket(BucketZone):
    """A bucket that records what was taken of its listing."""

    def __init__(self) -> None:
        super().__init__(Bucket("s3://bucket", lambda limits: None))
        self.listed = 0

    def files(self) -> Iterator[LandingFile]:
        while True:
            self.listed += 1
            yield LandingFile(f"{self.listed}.ndjson", 1, "e", datetime(2024, 1, 5, tzinfo=UTC))


def test_a_listing_of_a_bucket_is_recorded_as_it_comes_however_long_it_is() -> None:
    zone = _Bucket()
    step = LandingStep(zone, cast(Receiver, None), cast(OpenSession, None), max_bytes=1)
    assert len(list(islice(step._list_files(assume_complete=False), 3))) == 3
    assert zone.listed == 3
